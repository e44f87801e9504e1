"""Time per step and memory by size: water boxes from 648 to 17,496 atoms, direct forces.

    python -m benchmarks scaling --output scaling.json --plot scaling.png

Sizes follow each other, so on a machine that others use compare them by the processor's time, which is stored too.
"""

from pathlib import Path

from benchmarks.speed import parser_of, run
from benchmarks.workers import ours


def plot(results, picture):
    """Time per step over atoms, both logarithmic, with a line of slope one through the first point of each row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axis = figure.subplots()
    for k, label in enumerate(next(iter(results.values()))["rows"]):
        points = [(s["n_atoms"], s["rows"][label]["ms_per_step"]) for s in results.values() if "ms_per_step" in s["rows"].get(label, {})]
        if points:
            n, t = zip(*points, strict=True)
            axis.plot(n, t, "o-", color=f"C{k}", label=label)
            axis.plot(n, [t[0] * m / n[0] for m in n], ":", color=f"C{k}", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel="atoms", ylabel="ms per step (dotted: linear)")
    axis.legend()
    figure.savefig(picture, dpi=130)


def main():
    """Measure, print, write JSON and a picture."""
    parser = parser_of(__doc__)
    parser.add_argument("--modes", default="direct")
    parser.add_argument("--waters", default="216,1728,5832", help="numbers of waters, with commas")
    parser.add_argument("--plot", type=Path, help="picture")
    arguments = parser.parse_args()
    where = {"platform": arguments.platform, "threads": arguments.threads}
    rows = {mode: ours(arguments.model, mode, **where) for mode in arguments.modes.split(",")}
    results = run(arguments, [f"water{n}" for n in arguments.waters.split(",")], rows)
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
