"""Everything about a GPU in one command: correctness of all paths, CUDA graphs, kernels, time per step by size and mode beside peers.

    python -m benchmarks gpu --output gpu                                      refuses where OpenMM has no CUDA platform
    python -m benchmarks gpu --output rehearsal --platform Reference --sizes ethanol,water66 --blocks 1 --seconds 0.2

Writes ``gpu.json``, ``gpu.md`` with the tables and ``gpu.png`` into the directory, after each step what there is. ``--parts`` chooses of:

- checks of energy and forces of every force mode on a molecule, a periodic box, and a subset of atoms in any order in a triclinic box, against the
  Reference platform in double precision; and of where dynamics leads with CUDA graphs, and a report of the energy alone now and then, against
  where it leads without. Exits with status 1 if one is off by more than the limit of its precision;
- speed: time per step of every mode from 9 to 50,000 atoms, with CUDA graphs and, where there are any, without; of a TorchForce that computes
  nothing; and of every peer that the interpreter holds or that ``--peer`` names (see ``python -m benchmarks speed --help``). What does not fit
  into memory is reported as such and the others go on;
- operators: kernels launched by one evaluation.

With another platform the same runs as a rehearsal, without the parts that only a GPU has.
"""

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import openmm
import torch
from openmm import app, unit

from benchmarks.evaluation import evaluations, force_modes
from benchmarks.records import machine, save, settings_of
from benchmarks.scaling import plot
from benchmarks.speed_worker import cuda_peak_mb, resident_mb, start, time_block
from benchmarks.systems import NAMES, water_box, write_structure
from benchmarks.workers import Row, line_of, measure, peers
from openmm_se3 import SE3Potential
from openmm_se3.cuda_graphs import width_for
from openmm_se3.model_file import read_metadata
from openmm_se3.platforms import platform_names
from openmm_se3.structures import read_structure

SIZES = "ethanol,alanine-dipeptide,water66,water216,water833,water1728,water3333,water8333,water16666"
PARTS = "checks,speed,operators"
EXAMPLES = Path(__file__).parent.parent / "examples"
#: Largest deviation of a force over the largest force, and of the energy (kJ/mol) per atom.
LIMITS = {"single": (2e-4, 5e-3), "double": (1e-6, 1e-5)}
#: Atoms up to which modes are timed without CUDA graphs too; where there are none, no difference is measured.
GRAPHS_UP_TO = 1000
#: Atoms up to which multiple time steps are timed; a step is made of the same evaluations whatever the size.
MULTIPLE_TIME_STEPS_UP_TO = 1000
#: What is checked is made for so many, and what it is checked against for none: the sum of the forces is the same.
INNER_STEPS = 4
MODULE_OF_PEER = {"so3lr": "so3krates_torch", "nequip=1": "nequip", "nequip=2": "nequip"}


def cases():
    """Topology, positions (nm) and atoms of the model of every kind of System, by name."""
    topology, positions = read_structure(EXAMPLES / "ethanol.sdf")
    positions = positions + np.random.default_rng(0).normal(scale=0.003, size=positions.shape)
    box_topology, box_positions = water_box(66)
    both = app.Modeller(topology, positions * unit.nanometer)
    both.add(topology, (positions + np.array([0.9, 0.2, 0.1])) * unit.nanometer)
    both.topology.setPeriodicBoxVectors(np.array([[2.0, 0, 0], [0.4, 1.9, 0], [-0.5, 0.6, 1.8]]) * unit.nanometer)
    atoms = (9 + np.random.default_rng(1).permutation(9)).tolist()
    return {
        "molecule": (topology, positions, None),
        "periodic": (box_topology, box_positions, None),
        "subset, triclinic": (both.topology, np.array(both.positions.value_in_unit(unit.nanometer)), atoms),
    }


def context_of(potential, topology, atoms, platform, precision):
    """A Context in which the potential alone acts, and whether all its forces are CUDA graphs there."""
    system = openmm.System()
    vectors = topology.getPeriodicBoxVectors()
    if vectors is not None:
        system.setDefaultPeriodicBoxVectors(*vectors)
    for atom in topology.atoms():
        system.addParticle(atom.element.mass)
    forces = potential.addForces(topology, system, atoms)
    graphs = all(force.getProperties()["useCUDAGraphs"] == "true" for force in forces)
    properties = {"Precision": precision} if platform in ("CUDA", "OpenCL", "HIP") else {}
    integrator = openmm.VerletIntegrator(0.0002)
    return openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform), properties), graphs


def results_of(context):
    """Energy (kJ/mol) and forces (kJ/mol/nm)."""
    state = context.getState(getEnergy=True, getForces=True)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    return state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole), np.array(forces)


def evaluate(potential, topology, positions, atoms, platform, precision, calls=1):
    """Energy and forces on a platform, of the last of some calls."""
    context, _ = context_of(potential, topology, atoms, platform, precision)
    for k in range(calls):
        # Another place each time, and back at the last: what has been captured must follow the positions.
        context.setPositions(positions + 1e-3 * (calls - 1 - k))
        found = results_of(context)
    return found


def after_some_steps(potential, topology, positions, atoms, graphs):
    """Energy and forces after 40 steps, with a report of the energy alone every 10."""
    context, found = context_of(potential, topology, atoms, "CUDA", "single")
    if found != graphs:
        raise openmm.OpenMMException(f"CUDA graphs are {'on' if found else 'off'}")
    context.setPositions(positions)
    for _ in range(4):
        context.getIntegrator().step(10)
        context.getState(getEnergy=True)
    return results_of(context)


def deviation(found, expected):
    """Largest deviation of a force over the largest force, and of the energy per atom (kJ/mol)."""
    (energy, forces), (right_energy, right_forces) = found, expected
    force_error = float(np.abs(forces - right_forces).max() / np.abs(right_forces).max())
    return force_error, abs(energy - right_energy) / len(forces)


def check_mode(mode, model, platform):
    """Every case and precision of a mode: against the Reference platform in double precision, and with CUDA graphs against without."""
    torch.set_num_threads(2)  # others run beside this one
    rows, graphs = [], []
    exact = SE3Potential(model, forces=mode, precision="double")
    cutoff = read_metadata(model).cutoff_nm
    for name, (topology, positions, atoms) in cases().items():
        expected = evaluate(exact, topology, positions, atoms, "Reference", "double")
        for precision, limits in LIMITS.items():
            row = {"case": name, "mode": mode, "precision": precision, "limits": limits}
            # The third call: TorchScript runs optimised code only from the second on.
            potential = SE3Potential(model, forces=mode, precision=precision, cuda_graphs=False, inner_steps=INNER_STEPS)
            rows.append(row | _compare(expected, limits, evaluate, potential, topology, positions, atoms, platform, precision, 3))
        if platform == "CUDA":
            chosen = positions if atoms is None else positions[atoms]
            width = width_for(chosen, topology.getPeriodicBoxVectors(), cutoff)
            plain = SE3Potential(model, forces=mode, cuda_graphs=False)
            captured = SE3Potential(model, forces=mode, max_neighbors=width, inner_steps=INNER_STEPS)
            row = {"case": name, "mode": mode, "precision": "graphs", "limits": LIMITS["single"]}
            without = after_some_steps(plain, topology, positions, atoms, False)
            graphs.append(row | _compare(without, LIMITS["single"], after_some_steps, captured, topology, positions, atoms, True))
    return rows, graphs


def _compare(expected, limits, function, *arguments):
    try:
        force_error, energy_error = deviation(function(*arguments), expected)
    except openmm.OpenMMException as error:
        return {"passed": False, "error": str(error).strip().splitlines()[-1]}
    return {"force_error": force_error, "energy_error": energy_error, "passed": force_error <= limits[0] and energy_error <= limits[1]}


def line_of_check(row):
    """One line of the table of correctness."""
    what = f"{row['case']:18s} {row['mode']:14s} {row['precision']:8s}"
    if "error" in row:
        return f"{what} FAILED: {row['error']}"
    return f"{what} force {row['force_error']:.1e}  energy {row['energy_error']:.1e} kJ/mol per atom  {'ok' if row['passed'] else 'FAILED'}"


def installed_peers(platform):
    """Rows of the peers that this interpreter holds."""
    found = [name for name, module in MODULE_OF_PEER.items() if importlib.util.find_spec(module) and importlib.util.find_spec("openmmml")]
    return {name.replace("=", " "): Row(name, sys.executable, platform) for name in found}


def time_mode(potential, pdb, platform, graphs, blocks, seconds):
    """Record of one potential in this process: a GPU is no faster or slower for what runs beside it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        timed = start(potential, pdb, platform, graphs)
        records = [time_block(*timed, "seconds", seconds) for _ in range(blocks)]
    except (openmm.OpenMMException, RuntimeError) as error:
        return {"error": str(error)}
    out = {k: statistics.median(r[k] for r in records) for k in ("ms_per_step", "cpu_ms_per_step", "cpu_per_wall")}
    memory = {"peak_mb": resident_mb(), "cuda_peak_mb": cuda_peak_mb()}
    return out | memory | {"blocks": [r["ms_per_step"] for r in records], "finite": all(r["finite"] for r in records)}


def measure_speed(arguments, modes, structures):
    """Time per step of every mode and peer by size."""
    results = {}
    on_gpu = arguments.platform == "CUDA"
    for name, (structure, n_atoms) in structures.items():
        pdb = app.PDBFile(str(structure))
        wanted = [mode for mode in modes if not mode.startswith("mts") or n_atoms <= MULTIPLE_TIME_STEPS_UP_TO]
        rows = {mode: (f"se3={arguments.model}:{mode}", True) for mode in wanted}
        if on_gpu and n_atoms <= GRAPHS_UP_TO:
            rows |= {f"{mode}, no graphs": (f"se3={arguments.model}:{mode}", False) for mode in wanted if not mode.startswith("mts")}
            rows["nothing"] = ("nothing", False)
        records = {}
        others = installed_peers(arguments.platform) | peers(arguments.peer, platform=arguments.platform)
        for label, (potential, graphs) in rows.items():
            records[label] = time_mode(potential, pdb, arguments.platform, graphs, arguments.blocks, arguments.seconds)
            print(line_of(name, n_atoms, label, records[label], next(iter(records.values()))), flush=True)
        records |= measure(structure, others, arguments.blocks, arguments.seconds)
        for label in others:
            print(line_of(name, n_atoms, label, records[label], next(iter(records.values()))), flush=True)
        results[name] = {"n_atoms": n_atoms, "rows": records}
        yield results


def count_operators(model, modes, structures, device):
    """Operators and kernels of one evaluation, by structure and term."""
    from benchmarks.operators import count

    results = {}
    for name, structure in structures.items():
        results[name] = {term: count(function, device) for term, function in evaluations(model, structure, modes, device).items()}
        for term, record in results[name].items():
            print(f"{name:18s} {term:28s} {record['operators']:5d} operators, CUDA kernels: {record['cuda_kernels']}", flush=True)
    return results


def table(record):
    """The results as Markdown."""
    lines = [
        f"Machine: {json.dumps(record['machine'])}",
        "",
        "| system | atoms | potential | ms/step | us/atom/step | GPU MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, system in record["systems"].items():
        for label, r in system["rows"].items():
            if "error" in r:
                lines.append(f"| {name} | {system['n_atoms']} | {label} | failed: {r['error'].splitlines()[-1][:60]} | | |")
            else:
                each = 1e3 * r["ms_per_step"] / system["n_atoms"]
                gpu = "" if r["cuda_peak_mb"] is None else f"{r['cuda_peak_mb']:.0f}"
                lines.append(f"| {name} | {system['n_atoms']} | {label} | {r['ms_per_step']:.3f} | {each:.2f} | {gpu} |")
    lines += ["", "| case | mode | precision | force error | energy error, kJ/mol per atom | |", "|---|---|---|---|---|---|"]
    for row in record["correctness"] + record["graphs"]:
        numbers = row["error"][:80] + " |" if "error" in row else f"{row['force_error']:.1e} | {row['energy_error']:.1e}"
        lines.append(f"| {row['case']} | {row['mode']} | {row['precision']} | {numbers} | {'ok' if row['passed'] else 'FAILED'} |")
    lines += ["", "| system | force | operators | CUDA kernels |", "|---|---|---|---|"]
    for name, terms in record["operators"].items():
        lines += [f"| {name} | {term} | {r['operators']} | {r['cuda_kernels']} |" for term, r in terms.items()]
    return "\n".join(lines) + "\n"


def main():
    """Check, measure, write table, picture and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory to make")
    parser.add_argument("--platform", default="CUDA", help="CUDA; another one for a rehearsal")
    parser.add_argument("--model", default="se3-ani1x", help="name or path")
    parser.add_argument("--parts", default=PARTS, help="with commas; by default all")
    parser.add_argument("--modes", help="with commas; by default all that the model has")
    parser.add_argument("--sizes", default=SIZES, help=NAMES)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME[=OPTIONS]=PYTHON")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a block")
    arguments = parser.parse_args()
    platforms = platform_names()
    if arguments.platform not in platforms:
        parser.error(
            f"OpenMM has no platform {arguments.platform} here; it has {', '.join(platforms)}. On a machine with a GPU install the build for it, "
            "pip install '.[cuda12]'; for a rehearsal without one give --platform Reference and small --sizes"
        )
    unknown = set(arguments.parts.split(",")) - set(PARTS.split(","))
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {PARTS}")
    on_gpu = arguments.platform == "CUDA"
    if on_gpu and machine()["gpu"] is None:
        parser.error("OpenMM has the platform CUDA, but torch sees no GPU; install torch for its driver; openmm-se3 doctor tells more")
    if arguments.output.exists() and any(arguments.output.iterdir()):
        parser.error(f"{arguments.output} is not empty; choose another directory")
    arguments.output.mkdir(parents=True, exist_ok=True)
    parts = arguments.parts.split(",")
    modes = arguments.modes.split(",") if arguments.modes else force_modes(arguments.model)
    record = {"settings": settings_of(arguments), "model": arguments.model, "correctness": [], "graphs": [], "operators": {}, "systems": {}}

    def store():
        save(arguments.output / "gpu.json", **record)
        (arguments.output / "gpu.md").write_text(table({"machine": machine(), **record}))
        if record["systems"]:
            plot(record["systems"], arguments.output / "gpu.png")

    warnings.filterwarnings("ignore", message=".*TorchScript|.*torch.jit", category=DeprecationWarning)
    names = arguments.sizes.split(",")
    with tempfile.TemporaryDirectory() as directory:
        # Checks and the making of large boxes wait for the processor, so on a GPU machine, which has many cores, they run beside each other.
        with ProcessPoolExecutor(len(modes) + 4, multiprocessing.get_context("spawn")) if on_gpu else nullcontext() as pool:
            run = map if pool is None else pool.map
            written = run(write_structure, names, [directory] * len(names))
            checked = [modes, [arguments.model] * len(modes), [arguments.platform] * len(modes)] if "checks" in parts else [[]] * 3
            for rows, graphs in run(check_mode, *checked):
                record["correctness"] += rows
                record["graphs"] += graphs
                for row in rows + graphs:
                    print(line_of_check(row), flush=True)
                store()
            structures = dict(zip(names, written, strict=True))
        if "speed" in parts:
            for systems in measure_speed(arguments, modes, structures):
                record["systems"] = systems
                store()
        if "operators" in parts:
            small = {name: path for name, (path, n_atoms) in structures.items() if n_atoms < 1000}
            record["operators"] = count_operators(arguments.model, modes, dict(list(small.items())[:3]), "cuda" if on_gpu else "cpu")
    store()
    checks = record["correctness"] + record["graphs"]
    failed = [row for row in checks if not row["passed"]]
    print(f"wrote gpu.json, gpu.md and gpu.png to {arguments.output}; {len(failed)} of {len(checks)} checks failed")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
