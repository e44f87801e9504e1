"""Peak memory by size and force mode: what the potential adds to a process that has torch and OpenMM loaded.

    python -m benchmarks memory --output memory.json

Each in a process of its own; on a GPU what torch allocated there at most. The last column, the difference to the row before over the difference in
atoms, is what an atom costs once the fixed part is paid: level where memory is linear in the number of atoms.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.records import save, settings_of
from benchmarks.systems import write_structure
from benchmarks.workers import measure, ours


def main():
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="se3-ani1x", help="name or path")
    parser.add_argument("--modes", default="direct,conservative")
    parser.add_argument("--waters", default="432,1728", help="numbers of waters, with commas")
    parser.add_argument("--platform", default="Reference")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for mode in arguments.modes.split(","):
            before = None
            for waters in (int(n) for n in arguments.waters.split(",")):
                structure, n_atoms = write_structure(f"water{waters}", directory)
                row = ours(arguments.model, mode, platform=arguments.platform, threads=arguments.threads)
                record = measure(structure, {mode: row}, blocks=1, seconds=0.0)[mode]
                if "error" not in record:
                    on_gpu = arguments.platform == "CUDA"
                    record["potential_mb"] = record["cuda_peak_mb"] if on_gpu else record["peak_of_the_potential_mb"]
                    here = (n_atoms, record["potential_mb"])
                    record["kb_per_added_atom"] = None if before is None else 1024 * (here[1] - before[1]) / (here[0] - before[0])
                    each = "" if before is None else f"  {record['kb_per_added_atom']:6.1f} kB for each atom more"
                    print(f"{mode:14s} {n_atoms:6d} atoms  {here[1]:8.0f} MB{each}", flush=True)
                    before = here
                else:
                    print(f"{mode:14s} {n_atoms:6d} atoms  FAILED: " + record["error"].splitlines()[-1], flush=True)
                results.setdefault(mode, {})[str(n_atoms)] = record
    if arguments.output:
        save(arguments.output, model=arguments.model, settings=settings_of(arguments), results=results)


if __name__ == "__main__":
    main()
