"""Equivariance error (equation 3.1 of the thesis) of every layer of a network, and of its outputs.

    python -m benchmarks.equivariance [--checkpoint runs/joint/last.ckpt]

A random cluster of atoms is evaluated as it is and after random rotations and reflections. Each layer's output on the transformed cluster is
compared with the transformed output: |f(R x) - R f(x)| / |f(x)|, the worst of all degrees and transformations, errors of earlier layers
included. Without a checkpoint the weights are random.
"""

import argparse
from pathlib import Path

import torch

from tests.training.helpers import NUMBERS, equivariance_error, evaluate, random_cluster, random_orthogonal, transform
from training.checkpoint import load_checkpoint
from training.network import NetworkConfig, SE3Transformer
from training.network.attention import EquivariantAttention
from training.network.linear import EquivariantLinear
from training.network.norm import EquivariantRMSNorm
from training.network.self_interaction import AttentiveSelfInteraction
from training.network.transformer import TransformerLayer

LAYERS = (EquivariantLinear, EquivariantRMSNorm, EquivariantAttention, AttentiveSelfInteraction, TransformerLayer)


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
    seen["energy"] = [energy.detach().view(-1, 1, 1)]
    seen["direct force"] = [energy.detach().view(-1, 1, 1), force.detach().unsqueeze(-1)]
    return seen


def main():
    """Print one line per layer: float32 and float64."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--transformations", type=int, default=10)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    network = load_checkpoint(arguments.checkpoint).network if arguments.checkpoint else SE3Transformer(NetworkConfig(), NUMBERS)
    species, positions = random_cluster(20, spread=2.0)
    worst: dict[str, dict[torch.dtype, float]] = {}
    for dtype in (torch.float32, torch.float64):
        network.to(dtype)
        plain = outputs(network, species, positions)
        for seed in range(arguments.transformations):
            q = random_orthogonal(seed, reflect=seed % 2 == 1)
            for name, features in outputs(network, species, positions @ q.T).items():
                error = equivariance_error(features, transform(plain[name], q))
                of_layer = worst.setdefault(name, {})
                of_layer[dtype] = max(of_layer.get(dtype, 0.0), error)
    print(f"{'layer':45s} {'float32':>10s} {'float64':>10s}")
    for name, errors in worst.items():
        print(f"{name:45s} {errors[torch.float32]:10.1e} {errors[torch.float64]:10.1e}")
    largest = [max(e[d] for e in worst.values()) for d in (torch.float32, torch.float64)]
    print(f"{'largest':45s} {largest[0]:10.1e} {largest[1]:10.1e}")


if __name__ == "__main__":
    main()
