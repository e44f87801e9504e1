"""Time per step inside OpenMM: this project's model in every force mode beside other potentials.

    python -m benchmarks speed                                    ethanol, alanine dipeptide, 216 waters; all force modes
    python -m benchmarks speed --peer so3lr=/envs/so3/bin/python --peer nequip=1=/envs/nequip/bin/python

A peer is NAME=INTERPRETER or NAME=OPTIONS=INTERPRETER: a potential of `benchmarks/speed_worker.py` and the Python of an environment that
holds it, openmm and openmm-ml. Blocks of all potentials are interleaved, and the median is printed; what is compared was measured in one
run. Atoms are tied to their start by soft springs. ``cpu/wall`` far from the number of threads says that something else ran.
"""

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks.evaluation import force_modes
from benchmarks.records import save, settings_of
from benchmarks.systems import NAMES, write_structure
from benchmarks.workers import line_of, measure, ours, peers


def parser_of(description):
    """Options that all benchmarks of time per step share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="se3-ani1x", help="name or path")
    parser.add_argument("--platform", default="Reference")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a block")
    parser.add_argument("--output", type=Path, help="JSON")
    return parser


def run(arguments, systems, rows):
    """Measure, print, store."""
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in systems:
            structure, n_atoms = write_structure(name, directory)
            records = measure(structure, rows, arguments.blocks, arguments.seconds)
            results[name] = {"n_atoms": n_atoms, "rows": records}
            first = next(iter(records.values()))
            for label, record in records.items():
                print(line_of(name, n_atoms, label, record, first), flush=True)
    if arguments.output:
        save(arguments.output, model=arguments.model, settings=settings_of(arguments), systems=results)
    return results


def main():
    """Measure what was asked for, print a table, write JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--modes", help="with commas, mts@4 for 4 inner steps in place of 8; by default all that the model has")
    parser.add_argument("--systems", default="ethanol,alanine-dipeptide,water216", help=NAMES)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME[=OPTIONS]=PYTHON")
    arguments = parser.parse_args()
    arguments.modes = arguments.modes or ",".join(force_modes(arguments.model))
    where = {"platform": arguments.platform, "threads": arguments.threads}
    rows = {mode: ours(arguments.model, mode, **where) for mode in arguments.modes.split(",")} | peers(arguments.peer, **where)
    run(arguments, arguments.systems.split(","), rows)


if __name__ == "__main__":
    main()
