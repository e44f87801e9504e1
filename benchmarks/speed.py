"""Time per step inside OpenMM: this project's model in every force mode, by size of the system, beside other potentials.

    python benchmarks/speed.py                                    ethanol, alanine dipeptide, 216 waters; all force modes
    python benchmarks/speed.py --scaling                          water boxes from 648 to 17,496 atoms, direct forces
    python benchmarks/speed.py --peer so3lr=/envs/so3/bin/python --peer nequip=1=/envs/nequip/bin/python

A peer is NAME=INTERPRETER or NAME=OPTIONS=INTERPRETER: a potential of `benchmarks/speed_worker.py` and the Python of an environment that
holds it, openmm and openmm-ml. Blocks of all potentials are interleaved, and the median is printed; what is compared was measured in one
run. ``cpu/wall`` far from the number of threads says that something else ran.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import openmm
from openmm import Vec3, app, unit

from openmm_se3.structures import read_structure

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("speed_worker.py")


def water_box(molecules, path):
    """Write a periodic box of liquid water."""
    modeller = app.Modeller(app.Topology(), [] * unit.nanometer)
    modeller.addSolvent(app.ForceField("tip3p.xml"), numAdded=molecules)
    # addSolvent sizes the box for a molecule in it; the density of the liquid follows from the number.
    edge = (molecules * 0.02992) ** (1 / 3)
    x = modeller.positions.value_in_unit(unit.nanometer)
    have = modeller.topology.getPeriodicBoxVectors()[0][0].value_in_unit(unit.nanometer)
    molecules_of = list(modeller.topology.residues())
    scaled = list(x)
    for residue in molecules_of:
        atoms = [a.index for a in residue.atoms()]
        shift = x[atoms[0]] * (edge / have - 1)
        for i in atoms:
            scaled[i] = x[i] + shift
    modeller.topology.setPeriodicBoxVectors([Vec3(edge, 0, 0), Vec3(0, edge, 0), Vec3(0, 0, edge)] * unit.nanometer)
    with open(path, "w") as file:
        app.PDBFile.writeFile(modeller.topology, scaled * unit.nanometer, file)


def molecule(name, path):
    """Write one of the example structures as PDB."""
    topology, positions = read_structure(ROOT / "examples" / name)
    with open(path, "w") as file:
        app.PDBFile.writeFile(topology, positions * unit.nanometer, file)


class Worker:
    """One potential on one structure, in a process of its own."""

    def __init__(self, interpreter, potential, structure, openmm_platform, threads):
        environment = os.environ | {k: str(threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENMM_CPU_THREADS")}
        command = [interpreter, str(WORKER), potential, str(structure), "--platform", openmm_platform]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        self.records = []

    def block(self, seconds):
        """Time one block; the first one also waits for the start."""
        self.process.stdin.write(f"block {seconds}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                self.records.append(json.loads(line))
                return
        raise RuntimeError(self.process.stderr.read()[-2000:])

    def close(self):
        """End the process; median of the blocks."""
        self.process.stdin.close()
        self.process.wait()
        out = dict(self.records[-1])
        for key in ("ms_per_step", "cpu_ms_per_step", "cpu_per_wall"):
            out[key] = statistics.median(r[key] for r in self.records)
        return out | {"blocks": [r["ms_per_step"] for r in self.records]}


def measure(structure, rows, arguments):
    """Interleaved blocks of all rows ``{label: (interpreter, potential)}`` on one structure."""
    workers = {
        label: Worker(interpreter, potential, structure, arguments.platform, arguments.threads) for label, (interpreter, potential) in rows.items()
    }
    # One after the other: a worker that has started waits, and waiting costs nothing.
    for worker in workers.values():
        worker.block(0.0)
        worker.records.clear()
    for _ in range(arguments.blocks):
        for worker in workers.values():
            worker.block(arguments.seconds)
    return {label: worker.close() for label, worker in workers.items()}


def main():
    """Measure what was asked for, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="se3-ani1x", help="name or path")
    parser.add_argument("--modes", default="direct,conservative,mts")
    parser.add_argument("--systems", default="ethanol,alanine-dipeptide,water216")
    parser.add_argument("--scaling", action="store_true", help="water boxes of growing size instead")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME[=OPTIONS]=PYTHON")
    parser.add_argument("--platform", default="Reference")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a block")
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    rows = {mode: (sys.executable, f"se3={arguments.model}:{mode}") for mode in (["direct"] if arguments.scaling else arguments.modes.split(","))}
    for peer in arguments.peer:
        potential, _, interpreter = peer.rpartition("=")
        rows[potential.replace("=", " ")] = (interpreter, potential)
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in ["water216", "water1728", "water5832"] if arguments.scaling else arguments.systems.split(","):
            structure = Path(directory) / f"{name}.pdb"
            if name.startswith("water"):
                water_box(int(name.removeprefix("water")), structure)
            else:
                molecule({"ethanol": "ethanol.sdf", "alanine-dipeptide": "alanine_dipeptide.pdb"}[name], structure)
            n_atoms = app.PDBFile(str(structure)).topology.getNumAtoms()
            results[name] = {"n_atoms": n_atoms, "rows": measure(structure, rows, arguments)}
            first = next(iter(results[name]["rows"].values()))["ms_per_step"]
            for label, r in results[name]["rows"].items():
                print(
                    f"{name:18s} {n_atoms:6d} atoms  {label:16s} {r['ms_per_step']:10.2f} ms/step  {r['ms_per_step'] / first:6.2f} x  "
                    f"{1e3 * r['ms_per_step'] / n_atoms:8.1f} us/atom  peak {r['peak_mb']:6.0f} MB  cpu/wall {r['cpu_per_wall']:.2f}"
                    + ("" if r["finite"] else "  FORCES NOT FINITE"),
                    flush=True,
                )
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "platform": arguments.platform,
    }
    versions = {p: version(p) for p in ("torch",)} | {"openmm": openmm.__version__}
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"machine": machine, "versions": versions, "model": arguments.model, "systems": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
