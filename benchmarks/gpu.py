"""Everything about a GPU in one command: correctness of all paths, time per step by size and mode beside peers, CUDA graphs, kernels.

    python -m benchmarks gpu --output gpu                                      refuses where OpenMM has no CUDA platform
    python -m benchmarks gpu --output rehearsal --platform Reference --sizes ethanol,water66 --blocks 1 --seconds 0.2

Writes ``gpu.json``, ``gpu.md`` with the tables and ``gpu.png`` into the directory. The parts:

- correctness: energy and forces of every force mode on a molecule, a periodic box, and a subset of atoms in any order in a triclinic box, against
  the Reference platform in double precision; exits with status 1 if one is off by more than the limit of its precision;
- time per step of every mode from 9 to 50,000 atoms, and of every peer that the interpreter holds or that ``--peer`` names (see
  ``python -m benchmarks speed --help``), interleaved; what does not fit into memory is reported as such and the others go on;
- CUDA graphs on and off, and forces with them against those without;
- kernels launched by one evaluation.

With another platform the same runs as a rehearsal, without the parts that only a GPU has.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit

from benchmarks.evaluation import evaluations, force_modes
from benchmarks.records import machine, save, settings_of
from benchmarks.scaling import plot
from benchmarks.systems import NAMES, water_box, write_structure
from benchmarks.workers import Row, line_of, measure, ours, peers
from openmm_se3 import SE3Potential
from openmm_se3.structures import read_structure

SIZES = "ethanol,alanine-dipeptide,water22,water216,water833,water1728,water3333,water8333,water16666"
EXAMPLES = Path(__file__).parent.parent / "examples"
#: Largest deviation of a force over the largest force, and of the energy (kJ/mol) per atom.
LIMITS = {"single": (2e-4, 5e-3), "double": (1e-6, 1e-5)}
#: Atoms up to which CUDA graphs are tried; above, launching costs nothing beside computing.
GRAPHS_UP_TO = 3000
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


def evaluate(potential, topology, positions, atoms, platform, precision, graphs=False, calls=1):
    """Energy (kJ/mol) and forces (kJ/mol/nm) on a platform, of the last of some calls."""
    system = openmm.System()
    vectors = topology.getPeriodicBoxVectors()
    if vectors is not None:
        system.setDefaultPeriodicBoxVectors(*vectors)
    for atom in topology.atoms():
        system.addParticle(atom.element.mass)
    for force in potential.addForces(topology, system, atoms):
        if graphs:
            force.setProperty("useCUDAGraphs", "true")
    properties = {"Precision": precision} if platform in ("CUDA", "OpenCL", "HIP") else {}
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(platform), properties)
    for k in range(calls):
        # Another place each time, and back at the last: what a graph has captured must follow the positions.
        context.setPositions(positions + 1e-3 * (calls - 1 - k))
        state = context.getState(getEnergy=True, getForces=True)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    return state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole), np.array(forces)


def deviation(found, expected):
    """Largest deviation of a force over the largest force, and of the energy per atom (kJ/mol)."""
    (energy, forces), (right_energy, right_forces) = found, expected
    force_error = float(np.abs(forces - right_forces).max() / np.abs(right_forces).max())
    return force_error, abs(energy - right_energy) / len(forces)


def check_correctness(model, platform):
    """Every case, mode and precision on the platform against the Reference platform in double precision."""
    rows = []
    for mode in force_modes(model):
        exact = SE3Potential(model, forces=mode, precision="double")
        for name, (topology, positions, atoms) in cases().items():
            expected = evaluate(exact, topology, positions, atoms, "Reference", "double")
            for precision, limits in LIMITS.items():
                potential = SE3Potential(model, forces=mode, precision=precision)
                row = {"case": name, "mode": mode, "precision": precision, "limits": limits}
                try:
                    # The third call: TorchScript runs optimised code only from the second on.
                    found = evaluate(potential, topology, positions, atoms, platform, precision, calls=3)
                    row["force_error"], row["energy_error"] = deviation(found, expected)
                    row["passed"] = row["force_error"] <= limits[0] and row["energy_error"] <= limits[1]
                except openmm.OpenMMException as error:
                    row |= {"passed": False, "error": str(error).strip().splitlines()[-1]}
                rows.append(row)
                print(line_of_check(row), flush=True)
    return rows


def line_of_check(row):
    """One line of the table of correctness."""
    what = f"{row['case']:18s} {row['mode']:14s} {row['precision']:8s}"
    if "error" in row:
        return f"{what} FAILED: {row['error']}"
    return f"{what} force {row['force_error']:.1e}  energy {row['energy_error']:.1e} kJ/mol per atom  {'ok' if row['passed'] else 'FAILED'}"


def check_graphs(model):
    """Forces with CUDA graphs against those without, by case and mode; what cannot be captured says why."""
    rows = []
    for mode in force_modes(model):
        potential = SE3Potential(model, forces=mode)
        for name, (topology, positions, atoms) in cases().items():
            row = {"case": name, "mode": mode, "precision": "graphs", "limits": LIMITS["single"]}
            try:
                eager = evaluate(potential, topology, positions, atoms, "CUDA", "single")
                graphs = evaluate(potential, topology, positions, atoms, "CUDA", "single", graphs=True, calls=3)
                row["force_error"], row["energy_error"] = deviation(graphs, eager)
                row["passed"] = row["force_error"] <= LIMITS["single"][0] and row["energy_error"] <= LIMITS["single"][1]
            except openmm.OpenMMException as error:
                row |= {"passed": False, "error": str(error).strip().splitlines()[-1]}
            rows.append(row)
            print(line_of_check(row), flush=True)
    return rows


def installed_peers(platform):
    """Rows of the peers that this interpreter holds."""
    found = [name for name, module in MODULE_OF_PEER.items() if importlib.util.find_spec(module) and importlib.util.find_spec("openmmml")]
    return {name.replace("=", " "): Row(name, sys.executable, platform) for name in found}


def measure_speed(arguments, directory):
    """Time per step of every mode and peer by size; on CUDA of small systems with graphs on and off too."""
    results = {}
    modes = force_modes(arguments.model)
    for name in arguments.sizes.split(","):
        structure, n_atoms = write_structure(name, directory)
        rows = {mode: ours(arguments.model, mode, platform=arguments.platform) for mode in modes}
        if arguments.platform == "CUDA" and n_atoms <= GRAPHS_UP_TO:
            for mode in modes:
                for graphs in ("on", "off"):
                    rows[f"{mode}, graphs {graphs}"] = ours(arguments.model, mode, platform="CUDA", cuda_graphs=graphs)
        rows |= installed_peers(arguments.platform) | peers(arguments.peer, platform=arguments.platform)
        records = measure(structure, rows, arguments.blocks, arguments.seconds)
        results[name] = {"n_atoms": n_atoms, "rows": records}
        first = next(iter(records.values()))
        for label, record in records.items():
            print(line_of(name, n_atoms, label, record, first), flush=True)
    return results


def count_operators(model, names, device, directory):
    """Operators and kernels of one evaluation, by structure and term."""
    from benchmarks.operators import count

    results = {}
    modes = force_modes(model)
    for name in names:
        structure, _ = write_structure(name, directory)
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
    parser.add_argument("--sizes", default=SIZES, help=NAMES)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME[=OPTIONS]=PYTHON")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a block")
    arguments = parser.parse_args()
    platforms = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
    if arguments.platform not in platforms:
        parser.error(
            f"OpenMM has no platform {arguments.platform} here; it has {', '.join(platforms)}. On a machine with a GPU install the build for it, "
            "pip install '.[cuda12]'; for a rehearsal without one give --platform Reference and small --sizes"
        )
    on_gpu = arguments.platform == "CUDA"
    if on_gpu and machine()["gpu"] is None:
        parser.error("OpenMM has the platform CUDA, but torch sees no GPU; install torch for its driver; openmm-se3 doctor tells more")
    if arguments.output.exists() and any(arguments.output.iterdir()):
        parser.error(f"{arguments.output} is not empty; choose another directory")
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings_of(arguments), "model": arguments.model, "graphs": []}
    record["correctness"] = check_correctness(arguments.model, arguments.platform)
    if on_gpu:
        record["graphs"] = check_graphs(arguments.model)
    with tempfile.TemporaryDirectory() as directory:
        sizes = {name: write_structure(name, directory)[1] for name in arguments.sizes.split(",")}
        small = [name for name, n_atoms in sizes.items() if n_atoms < 1000][:3]
        record["operators"] = count_operators(arguments.model, small, "cuda" if on_gpu else "cpu", directory)
        record["systems"] = measure_speed(arguments, directory)
    save(arguments.output / "gpu.json", **record)
    (arguments.output / "gpu.md").write_text(table({"machine": machine(), **record}))
    plot(record["systems"], arguments.output / "gpu.png")
    failed = [row for row in record["correctness"] if not row["passed"]]
    refused = [row for row in record["graphs"] if not row["passed"]]
    if refused:
        print(f"{len(refused)} of {len(record['graphs'])} evaluations cannot be captured in a CUDA graph, or differ there; see gpu.md")
    print(f"wrote gpu.json, gpu.md and gpu.png to {arguments.output}; {len(failed)} of {len(record['correctness'])} checks failed")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
