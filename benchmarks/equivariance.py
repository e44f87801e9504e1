"""Equivariance error (equation 3.1 of the thesis) of every layer and degree of both forms of the network, and of their outputs.

    python -m benchmarks equivariance [--model se3-ani1x] [--output benchmarks/equivariance]

A random cluster of atoms is evaluated as it is, after random rotations with translations, and after reflections of these. Each layer's output on the
transformed cluster is compared with the transformed output: |f(R x + t) - R f(x)| / |f(x)|, the worst of all transformations, errors of earlier
layers included. Distances and directions are taken in float64, as the network does when it gets positions in float64; its weights and layers run in
the precision of the column. Without a model the weights are random, and the forms are production, reference with natural parity, and
reference with all J as in the thesis, for which a reflection is no symmetry once cross products have made pseudo-vectors: those columns are large
on purpose. Prints a table per form; with --output also writes equivariance.csv and equivariance.png.
"""

import argparse
import csv
from pathlib import Path

import torch

from benchmarks.clusters import NUMBERS, evaluate, random_cluster, random_orthogonal, transform
from training.checkpoint import load_checkpoint, load_exported
from training.network import NetworkConfig, ReferenceConfig, build_network
from training.network.attention import EquivariantAttention
from training.network.linear import EquivariantLinear
from training.network.norm import EquivariantRMSNorm
from training.network.reference.attention import ReferenceAttention
from training.network.reference.layer import ReferenceLayer
from training.network.reference.norm import NormNonlinearity
from training.network.reference.self_interaction import ReferenceSelfInteraction
from training.network.self_interaction import AttentiveSelfInteraction
from training.network.transformer import TransformerLayer

LAYERS = (EquivariantLinear, EquivariantRMSNorm, EquivariantAttention, AttentiveSelfInteraction, TransformerLayer)
LAYERS += (ReferenceLayer, ReferenceAttention, ReferenceSelfInteraction, NormNonlinearity)
DTYPES = (torch.float32, torch.float64)
TRANSFORMATIONS = ("roto-translation", "reflection")

# {(layer, degree): {(transformation, dtype): error}}, in the order of evaluation
Report = dict[tuple[str, int], dict[tuple[str, torch.dtype], float]]


def outputs(network, species, positions):
    """Output of every layer by name, and energies and forces, each as features per degree."""
    seen = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, [t.detach() for t in out]))
        for name, module in network.named_modules()
        if isinstance(module, LAYERS)
    ]
    energy, force = evaluate(network, species, positions)
    for handle in handles:
        handle.remove()
    # The outputs of the network: the energy is its degree 0, the direct force its degree 1.
    seen["energy and direct force"] = [energy.detach().view(-1, 1, 1), force.detach().unsqueeze(-1)]
    return seen


def report(network, n_transformations: int) -> Report:
    """Errors of every layer and degree."""
    species, positions = random_cluster(20, spread=2.0)
    errors: Report = {}
    for dtype in DTYPES:
        network.to(dtype)
        plain = outputs(network, species, positions)
        for seed in range(n_transformations):
            for name in TRANSFORMATIONS:
                q = random_orthogonal(seed, reflect=name == "reflection")
                shift = 3.0 * torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                for layer, features in outputs(network, species, positions @ q.T + shift).items():
                    for degree, (got, expected) in enumerate(zip(features, transform(plain[layer], q), strict=True)):
                        error = float((got - expected).norm() / expected.norm().clamp_min(1e-30))
                        cell = errors.setdefault((layer, degree), {})
                        cell[name, dtype] = max(cell.get((name, dtype), 0.0), error)
    return errors


def print_table(form: str, errors: Report) -> None:
    """One line per layer and degree, and the largest."""
    columns = [(t, d) for t in TRANSFORMATIONS for d in DTYPES]
    print(f"\n{form}")
    print(f"{'':47s} {'roto-translation':>21s} {'reflection':>21s}")
    print(f"{'layer':40s} {'degree':>6s} " + " ".join(f"{str(d).removeprefix('torch.'):>10s}" for _, d in columns))
    for (layer, degree), cell in errors.items():
        print(f"{layer:40s} {degree:6d} " + " ".join(f"{cell[c]:10.1e}" for c in columns))
    print(f"{'largest':47s} " + " ".join(f"{max(cell[c] for cell in errors.values()):10.1e}" for c in columns))


def write(reports: dict[str, Report], directory: Path) -> None:
    """The errors as CSV, and a picture of them."""
    from matplotlib.figure import Figure

    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "equivariance.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["form", "layer", "degree", "transformation", "precision", "error"])
        for form, errors in reports.items():
            for (layer, degree), cell in errors.items():
                for (transformation, dtype), error in cell.items():
                    writer.writerow([form, layer, degree, transformation, str(dtype).removeprefix("torch."), f"{error:.3g}"])
    figure = Figure(figsize=(11, 3.2 * len(reports)), layout="constrained")
    axes = figure.subplots(len(reports), 1, squeeze=False)
    for axis, (form, errors) in zip(axes[:, 0], reports.items(), strict=True):
        layers = list(dict.fromkeys(layer for layer, _ in errors))
        for (transformation, dtype), marker in zip([(t, d) for t in TRANSFORMATIONS for d in DTYPES], "o.x+", strict=True):
            for degree in range(4):
                points = [(layers.index(n), cell[transformation, dtype]) for (n, d), cell in errors.items() if d == degree]
                if points:
                    label = f"{transformation}, {str(dtype).removeprefix('torch.')}" if degree == 0 else None
                    axis.plot(*zip(*points, strict=True), marker, color=f"C{degree}", label=label, ms=6)
        axis.axhline(1e-6, color="gray", lw=0.8)
        axis.set(yscale="log", ylabel="relative error (3.1)", title=f"{form}; color: degree 0 blue, 1 orange, 2 green, 3 red")
        axis.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
        axis.legend(fontsize=6)
    figure.savefig(directory / "equivariance.png", dpi=110)


def main():
    """Print one table per form."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="released model, exported file, or checkpoint")
    parser.add_argument("--transformations", type=int, default=10, help="of each kind")
    parser.add_argument("--output", type=Path, help="directory for equivariance.csv and equivariance.png")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.model:
        is_checkpoint = Path(arguments.model).suffix == ".ckpt"
        networks = {arguments.model: (load_checkpoint(Path(arguments.model)) if is_checkpoint else load_exported(arguments.model)).network}
    else:
        configs = {
            "production": NetworkConfig(),
            "reference, natural parity": ReferenceConfig(channels=(5, 4, 3, 2), parity="natural"),
            "reference, all J": ReferenceConfig(channels=(5, 4, 3, 2)),
        }
        networks = {name: build_network(config, NUMBERS) for name, config in configs.items()}
    reports = {name: report(network, arguments.transformations) for name, network in networks.items()}
    for name, errors in reports.items():
        print_table(name, errors)
    if arguments.output:
        write(reports, arguments.output)


if __name__ == "__main__":
    main()
