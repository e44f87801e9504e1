"""Which platform of OpenMM and how many threads: direct forces, every combination interleaved.

    python -m benchmarks threads --output threads.json

A number of threads is that of torch and, where the platform is CPU, of OpenMM's kernels.
"""

import os

from benchmarks.speed import parser_of, run
from benchmarks.systems import NAMES
from benchmarks.workers import ours


def main():
    """Measure, print, write JSON."""
    parser = parser_of(__doc__)
    parser.set_defaults(threads=None)
    parser.add_argument("--systems", default="ethanol,alanine-dipeptide,water216", help=NAMES)
    parser.add_argument("--counts", default=",".join(str(n) for n in sorted({1, os.cpu_count() or 1})), help="numbers of threads, with commas")
    parser.add_argument("--platforms", default="Reference,CPU")
    arguments = parser.parse_args()
    rows = {
        f"{platform}, {count}": ours(arguments.model, "direct", platform=platform, threads=int(count))
        for platform in arguments.platforms.split(",")
        for count in arguments.counts.split(",")
    }
    run(arguments, arguments.systems.split(","), rows)


if __name__ == "__main__":
    main()
