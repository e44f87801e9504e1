"""Time and accuracy of matching the energy's gradient by first derivatives against differentiating twice.

    python benchmarks/force_matching.py CHECKPOINT PACKED

Both in one run, in turn: seconds per step, their ratio, and the relative difference of the gradients they give.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL

from training.checkpoint import load_checkpoint
from training.config import LossConfig
from training.data.batches import Collator, SizeSampler
from training.data.packed import PackedDataset
from training.force_matching import backward_force_matching
from training.loss import EnergyForceLoss, predict


def main():
    """Compare the two on batches of 100 molecules."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--batches", type=int, default=5)
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

    times, differences = {"once": [], "twice": []}, []
    for k in range(arguments.batches + 1):
        batch, gradients = collate(next(stream)), {}
        for name, run in (("once", lambda b: backward_force_matching(network, b, loss)), ("twice", twice)):
            network.zero_grad()
            start = time.perf_counter()
            run(batch)
            times[name].append(time.perf_counter() - start)
            gradients[name] = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        differences.append(float((gradients["once"] - gradients["twice"]).norm() / gradients["twice"].norm()))
        if k == 0:  # warm-up
            times, differences = {"once": [], "twice": []}, []
    ratios = np.array(times["once"]) / np.array(times["twice"])
    print(f"first derivatives {np.median(times['once']):.2f} s, differentiating twice {np.median(times['twice']):.2f} s per step")
    print(f"ratio of times {np.median(ratios):.2f}; relative difference of the gradients {np.median(differences):.4f}")


if __name__ == "__main__":
    main()
