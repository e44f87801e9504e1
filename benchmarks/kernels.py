"""Cost of an attention layer's kernels: the thesis' full kernels against the inference form, same channels and edges, on one thread.

    python -m benchmarks kernels

The full kernels form keys alone (values cost the same again, softmax and sum over neighbours come on top); the inference form is timed with
everything: radial table, messages, softmax, sum over neighbours.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.records import save, settings_of
from training.fused.attention import FusedAttention
from training.fused.edges import FusedGeometry, make_edges
from training.fused.network import N_INTERVALS
from training.fused.spline import SplineBasis
from training.network.attention import EquivariantAttention
from training.network.geometry import EdgeGeometry
from training.network.radial import BesselBasis
from training.network.reference.basis_kernels import BasisKernels
from training.network.reference.radial_kernels import RadialKernels

CUTOFF, N_BASIS, HIDDEN = 5.0, 12, 32


def main():
    """Time both, interleaved, over all receivers of a system in portions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=32, help="of each degree 0, 1, 2")
    parser.add_argument("--atoms", type=int, default=648)
    parser.add_argument("--neighbors", type=int, default=54, help="per atom; 54 are those of liquid water within 5 Angstrom")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    c, n, k = (arguments.channels,) * 3, arguments.atoms, arguments.neighbors
    displacement = torch.nn.functional.normalize(torch.randn(n, k, 3), dim=-1) * (0.9 + 4.0 * torch.rand(n, k, 1))
    neighbors = torch.randint(0, n, (n, k))
    features = [torch.randn(n, 2 * degree + 1, channels) for degree, channels in enumerate(c)]
    mask = torch.ones(n, k, dtype=torch.bool)
    distance, direction, _ = EdgeGeometry()(displacement, mask)
    bessel = BesselBasis(N_BASIS, CUTOFF)
    basis_kernels, kernels = BasisKernels(2, natural_parity=False), RadialKernels(c, c, 2, False, N_BASIS, HIDDEN)
    trained = EquivariantAttention(c, c, arguments.channels, 8, N_BASIS, HIDDEN).double()
    fused = FusedAttention(trained, BesselBasis(N_BASIS, CUTOFF), N_INTERVALS).float()
    geometry, spline = FusedGeometry(CUTOFF).float(), SplineBasis(CUTOFF, N_INTERVALS)
    value = torch.cat(features, dim=1)

    def full(part):
        scalars = bessel(distance[part])
        sender = [f[neighbors[part]] for f in features]
        return kernels(sender, scalars, basis_kernels(direction[part]))

    def inference(part):
        distance, _, coupling, log_cutoff = geometry(displacement[part], mask[part])
        return fused(value[part], value, make_edges(neighbors[part], spline(distance.view(-1)), coupling, log_cutoff))

    times = {"full kernels": [], "inference form": []}
    with torch.no_grad():
        for _ in range(arguments.repeats):
            for name, function, rows in (("full kernels", full, 8), ("inference form", inference, 32)):
                begin = time.process_time()
                for start in range(0, n, rows):
                    function(slice(start, start + rows))
                times[name].append(1e3 * (time.process_time() - begin))
    medians = {name: statistics.median(t) for name, t in times.items()}
    for name, t in medians.items():
        print(f"{name:16s} {t:10.1f} ms of one thread for {n} atoms with {k} neighbours each, {arguments.channels} channels per degree")
    ratio = medians["full kernels"] / medians["inference form"]
    print(f"ratio {ratio:.1f}")
    if arguments.output:
        save(arguments.output, settings=settings_of(arguments), cpu_ms=times, ratio=ratio)


if __name__ == "__main__":
    main()
