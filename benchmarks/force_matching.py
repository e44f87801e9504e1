"""Time and accuracy of matching the energy's gradient by first derivatives against differentiating twice.

    python -m benchmarks force-matching CHECKPOINT PACKED [--compile]

All in one run, in turn: seconds of processor time per step, ratios, and the relative difference of the gradients. With --compile,
first derivatives by the compiled network too.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL

from benchmarks.records import save, settings_of
from training.checkpoint import load_checkpoint
from training.config import LossConfig
from training.data.batches import Collator, SizeSampler
from training.data.packed import PackedDataset
from training.force_matching import backward_force_matching, positions_only
from training.loss import EnergyForceLoss, predict

#: Batches of which the times are dropped; compiling for variable sizes takes several.
WARM_UP = 4


def main():
    """Compare the two on batches of 100 molecules."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    loaded = load_checkpoint(arguments.checkpoint)
    network = loaded.network.requires_grad_(True)
    dataset = PackedDataset(arguments.packed)
    statistics = loaded.data["statistics"]
    loss = EnergyForceLoss(LossConfig(conservative_weight=1.0), statistics["residual_per_sqrt_atom"]["rms"], statistics["force_rms"])
    numbers = tuple(NUMBER_OF_SYMBOL[s] for s in loaded.config.network.elements)
    collate = Collator(dataset, numbers, loaded.config.network.cutoff)
    frames = dataset.indices("all")
    stream = SizeSampler(frames, np.diff(dataset.offsets)[frames], 100, 25_000, 0).stream(0)

    def twice(batch):
        loss.per_molecule(*predict(network, batch, True, create_graph=True), batch).mean().backward()

    def once(forward, atomic_energies):
        return lambda batch: backward_force_matching(forward, atomic_energies, batch, loss)

    atomic_energies = positions_only(network)
    ways = {"differentiating twice": twice, "first derivatives": once(network, atomic_energies)}
    if arguments.compile:
        compiled = torch.compile(network, dynamic=True), torch.compile(atomic_energies, dynamic=True)
        ways["first derivatives, compiled"] = once(*compiled)

    seconds, differences = {name: [] for name in ways}, {name: [] for name in ways}
    for k in range(WARM_UP + arguments.batches):
        batch, expected = collate(next(stream)), None
        for name, way in ways.items():
            network.zero_grad()
            start = time.process_time()
            way(batch)
            elapsed = time.process_time() - start
            gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
            expected = gradient if expected is None else expected
            if k >= WARM_UP:
                seconds[name].append(elapsed)
                differences[name].append(float((gradient - expected).norm() / expected.norm()))
    reference = np.array(seconds["differentiating twice"])
    for name in ways:
        ratio = np.median(np.array(seconds[name]) / reference)
        print(f"{name}: {np.median(seconds[name]):.2f} s per step, ratio {ratio:.2f}, difference of the gradients {np.median(differences[name]):.1e}")
    if arguments.output:
        save(arguments.output, settings=settings_of(arguments), cpu_seconds=seconds, relative_differences=differences)


if __name__ == "__main__":
    main()
