"""Does a long run keep its speed? Time per step after many steps over that at the start, in one process.

    python -m benchmarks endurance --output endurance.json

Medians of the first and of the last blocks, by the processor's time, which other programs disturb least; memory likewise, so that a leak shows.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.records import save, settings_of
from benchmarks.systems import NAMES, write_structure
from benchmarks.workers import Stepper, ours


def main():
    """Run, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="se3-ani1x", help="name or path")
    parser.add_argument("--mode", default="direct")
    parser.add_argument("--system", default="water", help=NAMES)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--blocks", type=int, default=100, help="how many blocks the steps are cut into; a tenth of them at each end is compared")
    parser.add_argument("--platform", default="Reference")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    if arguments.blocks < 10 or arguments.steps < arguments.blocks:
        parser.error(f"--blocks must be at least 10, and --steps no fewer than that; got {arguments.blocks} and {arguments.steps}")
    with tempfile.TemporaryDirectory() as directory:
        structure, n_atoms = write_structure(arguments.system, directory)
        worker = Stepper(ours(arguments.model, arguments.mode, platform=arguments.platform, threads=arguments.threads), structure)
        blocks = [worker.block(arguments.steps // arguments.blocks, "steps") for _ in range(arguments.blocks)]
        worker.close()
    end = arguments.blocks // 10
    # On a GPU the processor's time says nothing of what the GPU does.
    key = "ms_per_step" if arguments.platform in ("CUDA", "OpenCL", "HIP") else "cpu_ms_per_step"
    first, last = (statistics.median(b[key] for b in part) for part in (blocks[:end], blocks[-end:]))
    ratio = first / last
    grown = blocks[-1]["peak_mb"] - blocks[end]["peak_mb"]
    steps = sum(b["steps"] for b in blocks)
    print(f"{arguments.system}, {n_atoms} atoms, {steps:,} steps, {arguments.mode}: {first:.3f} ms/step at first, {last:.3f} at last")
    print(f"speed at the end over speed at the start {ratio:.3f}; peak memory grew by {grown:.1f} MB after the first tenth")
    if arguments.output:
        result = {"n_atoms": n_atoms, "first_ms": first, "last_ms": last, "speed_ratio": ratio, "memory_growth_mb": grown}
        save(arguments.output, model=arguments.model, settings=settings_of(arguments), result=result, blocks=[b[key] for b in blocks])


if __name__ == "__main__":
    main()
