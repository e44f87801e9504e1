"""Time integrator steps of one potential on one structure; run by `benchmarks.workers`, in the interpreter that holds the potential.

Needs OpenMM, NumPy and the potential alone. Prints one JSON record per line of standard input, ``seconds S`` or ``steps N``, so that the blocks
of several workers can be interleaved on one machine.
"""

import argparse
import json
import resource
import sys
import time
import warnings

#: Inner steps to an outer one, with multiple time steps, where nothing else is said.
INNER_STEPS = 8


def parts_of(forces):
    """Model, force mode and inner steps of ``MODEL:MODE`` or ``MODEL:MODE@STEPS``."""
    model, _, mode = forces.rpartition(":")
    mode, _, steps = mode.partition("@")
    return model, mode, int(steps or INNER_STEPS)


def se3(pdb, forces, platform, cuda_graphs):
    """openmm-se3; `forces` as `parts_of` takes them, the model by name or path."""
    from openmm import unit

    from openmm_se3 import SE3Potential
    from openmm_se3.cuda_graphs import width_for
    from openmm_se3.model_file import read_metadata

    model, mode, inner_steps = parts_of(forces)
    width = None
    if platform == "CUDA" and cuda_graphs:  # as `openmm-se3 simulate` does it
        x = pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        width = width_for(x, pdb.topology.getPeriodicBoxVectors(), read_metadata(model).cutoff_nm)
    potential = SE3Potential(model, forces=mode, max_neighbors=width, cuda_graphs=cuda_graphs, inner_steps=inner_steps)
    return potential.createSystem(pdb.topology, removeCMMotion=False)


def so3lr(pdb, options, platform, cuda_graphs):
    """SO3LR (so3krates-torch), published weights, through openmm-ml."""
    from openmmml import MLPotential
    from so3krates_torch.calculator.so3 import SO3LRCalculator

    calculator = SO3LRCalculator(r_max_lr=12.0, dispersion_energy_cutoff_lr_damping=2.0, default_dtype="float32")
    return MLPotential("ase").createSystem(pdb.topology, calculator=calculator, removeCMMotion=False, info={"charge": 0.0})


def nequip(pdb, options, platform, cuda_graphs):
    """NequIP, 4 layers of 32 features, random weights; `options` is its l_max."""
    import nequip.model.saved_models.load_utils as load_utils
    import torch
    from nequip.model import NequIPGNNModel
    from nequip.model.utils import override_model_compile_mode
    from nequip.utils.global_state import set_global_state
    from openmmml import MLPotential

    set_global_state()
    sizes = {"num_layers": 4, "l_max": int(options), "parity": True, "num_features": 32, "radial_mlp_depth": 2, "radial_mlp_width": 64}
    scales = {"avg_num_neighbors": 15.0, "per_type_energy_scales": 1e-2, "per_type_energy_shifts": 0.0}
    with override_model_compile_mode("eager"):
        model = NequIPGNNModel(seed=1, model_dtype="float32", r_max=5.0, type_names=["C", "H", "N", "O"], **sizes, **scales).eval()
    single = model["sole_model"] if isinstance(model, torch.nn.ModuleDict) else model
    load_utils.load_saved_model = lambda *arguments, **keywords: single  # random weights instead of a file
    return MLPotential("nequip", modelPath="random", lengthScale=0.1, energyScale=96.485).createSystem(pdb.topology, removeCMMotion=False)


def nothing(pdb, options, platform, cuda_graphs):
    """What a TorchForce costs that computes nothing."""
    import openmm
    import torch
    from openmmtorch import TorchForce

    class Nothing(torch.nn.Module):
        def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros([], dtype=torch.float64, device=positions.device), torch.zeros_like(positions)

    system = openmm.System()
    for atom in pdb.topology.atoms():
        system.addParticle(atom.element.mass)
    force = TorchForce(torch.jit.script(Nothing()))
    force.setOutputsForces(True)
    system.addForce(force)
    return system


POTENTIALS = {"nothing": nothing, "se3": se3, "so3lr": so3lr, "nequip": nequip}


def resident_mb():
    """Peak of the memory of this process, MB."""
    try:
        with open("/proc/self/status") as file:
            return next(float(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
    except OSError:  # no Linux: the figure may be that of the process that started this one, if it was larger
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)  # bytes there, else kB


def cuda_peak_mb():
    """Peak of what torch allocated on the GPU, MB; None without one."""
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() / 2**20 if torch is not None and torch.cuda.is_available() else None


def start(potential, pdb, platform, cuda_graphs=True):
    """Context, integrator, and inner steps that one of its steps takes, warmed up; `potential` is ``NAME`` or ``NAME=OPTIONS``."""
    import openmm
    from openmm import unit

    name, _, options = potential.partition("=")
    system = POTENTIALS[name](pdb, options, platform, cuda_graphs)
    # Every atom is tied to its start, for all potentials alike: random weights would else destroy the structure and its neighbour counts.
    restraint = openmm.CustomExternalForce("0.5*k*((x-x0)^2+(y-y0)^2+(z-z0)^2)")
    restraint.addGlobalParameter("k", 2e4)
    for parameter in ("x0", "y0", "z0"):
        restraint.addPerParticleParameter(parameter)
    x = pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    for i, at in enumerate(x):
        restraint.addParticle(i, list(at))
    system.addForce(restraint)
    _, mode, inner = parts_of(options)
    if name == "se3" and mode in ("mts", "mts-fast"):
        from openmm_se3 import MultipleTimeStepIntegrator

        # A step below is an outer one, so its time is divided. The restraint, in group 0 too, is soft: it does not mind that its kicks are uneven.
        step = inner * 0.5 * unit.femtosecond
        integrator = MultipleTimeStepIntegrator(300, 10 / unit.picosecond, step, inner, fastInSlow=True)
    else:
        integrator, inner = openmm.LangevinMiddleIntegrator(300, 10 / unit.picosecond, 0.5 * unit.femtosecond), 1
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform(platform))
    context.setPositions(x)
    context.setVelocitiesToTemperature(300, 5)
    # On a GPU TorchScript compiles at the second, third and fourth shape too.
    at_least = 40 if platform == "CUDA" else 4
    begin = time.perf_counter()
    done = 0
    while done < at_least or (time.perf_counter() - begin < 3.0 and done < 200):
        integrator.step(1)
        done += 1
    return context, integrator, inner


def time_block(context, integrator, inner, kind, amount):
    """Record of one block, ``seconds`` long or of a number of ``steps``."""
    import numpy as np
    from openmm import unit

    # Whole outer steps, at least one; with multiple time steps the inner ones are counted.
    wanted = max(1, int(amount) // inner) if kind == "steps" else None
    steps, start, cpu = 0, time.perf_counter(), time.process_time()
    batch = 1
    while steps == 0 or (steps < wanted if wanted else time.perf_counter() - start < float(amount)):
        if wanted:
            batch = min(batch, wanted - steps)
        integrator.step(batch)
        steps += batch
        batch = min(2 * batch, 64)
    wall = time.perf_counter() - start
    used = time.process_time() - cpu
    forces = context.getState(getForces=True).getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    return {
        "ms_per_step": 1e3 * wall / (steps * inner),
        "cpu_ms_per_step": 1e3 * used / (steps * inner),
        "cpu_per_wall": used / wall,
        "steps": steps * inner,
        "finite": bool(np.isfinite(forces).all()),
    }


def main():
    """Build, warm up, then time blocks on demand."""
    parser = argparse.ArgumentParser()
    parser.add_argument("potential", help="NAME or NAME=OPTIONS, of " + ", ".join(POTENTIALS))
    parser.add_argument("structure", help="PDB file")
    parser.add_argument("--platform", default="Reference")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch  # noqa: F401 - of every potential here, so that its own memory is not counted as theirs
    from openmm import app

    pdb = app.PDBFile(arguments.structure)
    before = resident_mb()
    timed = start(arguments.potential, pdb, arguments.platform)
    for line in sys.stdin:
        kind, amount = line.split()
        record = time_block(*timed, kind, amount)
        record |= {"peak_mb": resident_mb(), "peak_of_the_potential_mb": resident_mb() - before, "cuda_peak_mb": cuda_peak_mb()}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
