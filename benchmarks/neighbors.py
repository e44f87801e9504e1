"""Share of the neighbour list in the time of a direct evaluation, both interleaved in one process.

python -m benchmarks neighbors --output neighbors.json
"""

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch

from benchmarks.evaluation import evaluations, read
from benchmarks.records import save, settings_of
from benchmarks.systems import NAMES, write_structure
from openmm_se3.model_file import read_metadata
from training.neighbors import find_neighbors


def main():
    """Time, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="se3-ani1x", help="name or path")
    parser.add_argument("--systems", default="alanine-dipeptide,water216,water1728", help=NAMES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cutoff = read_metadata(arguments.model).cutoff_nm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        find = torch.jit.script(find_neighbors)
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.systems.split(","):
            structure, n_atoms = write_structure(name, directory)
            _, positions, box = read(structure, arguments.device)
            (evaluate,) = evaluations(arguments.model, structure, ["direct"], arguments.device).values()

            def list_neighbors(positions=positions, box=box):
                with torch.no_grad():
                    return find(positions, box, cutoff)

            times = {"neighbors": [], "evaluation": []}
            for k in range(arguments.repeats + 3):
                for key, function in (("neighbors", list_neighbors), ("evaluation", evaluate)):
                    start = time.perf_counter()
                    function()
                    if arguments.device == "cuda":
                        torch.cuda.synchronize()
                    if k >= 3:  # warm-up
                        times[key].append(1e3 * (time.perf_counter() - start))
            medians = {f"{key}_ms": statistics.median(t) for key, t in times.items()}
            share = medians["neighbors_ms"] / medians["evaluation_ms"]
            results[name] = {"n_atoms": n_atoms, **medians, "share": share, "repeats": times}
            print(
                f"{name:18s} {n_atoms:6d} atoms  {medians['neighbors_ms']:9.2f} of {medians['evaluation_ms']:9.2f} ms: {100 * share:5.1f}%",
                flush=True,
            )
    if arguments.output:
        save(arguments.output, model=arguments.model, settings=settings_of(arguments), results=results)


if __name__ == "__main__":
    main()
