"""Formulas of a test set that training data hold as one of several molecules: split by formula, they are not unseen for all that.

    python -m benchmarks.accuracy.fragments train.h5 test.h5

A pair has a formula of its own, so a split by formula says nothing of its halves (`python -m training prepare` gives notice of that). What remains
of the test set without these formulas is written by `benchmarks.accuracy.without`.
"""

import argparse
from collections import Counter
from pathlib import Path

import h5py
import numpy as np

from training.data.frames import hill_formula
from training.data.molecules import formulas_of_parts


def fragments(train: Path, test: Path) -> dict[str, tuple[int, int]]:
    """Of formulas of `test`: its conformations, and those of `train` in which one of several molecules has that formula."""
    with h5py.File(test) as file:
        tested = {hill_formula(group["atomic_numbers"][()]): len(group["coordinates"]) for group in file.values()}
    found: Counter[str] = Counter()
    with h5py.File(train) as file:
        for group in file.values():
            coordinates = group["coordinates"][()]
            numbers = np.broadcast_to(group["atomic_numbers"][()].astype(np.uint8), coordinates.shape[:2])
            for formulas in formulas_of_parts(numbers, coordinates):
                found.update(formulas & tested.keys())
    return {formula: (tested[formula], count) for formula, count in found.most_common()}


def main(argv: list[str] | None = None) -> None:
    """Print a line for each formula, and the sums."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("train", type=Path, help="HDF5, in the layout of ANI-1x")
    parser.add_argument("test", type=Path)
    arguments = parser.parse_args(argv)
    found = fragments(arguments.train, arguments.test)
    for formula, (tested, trained) in found.items():
        print(f"{formula}: {tested:,} conformations to test on, part of {trained:,} trained on")
    print(f"{len(found)} formulas, {sum(tested for tested, _ in found.values()):,} conformations to test on: {' '.join(sorted(found))}")


if __name__ == "__main__":
    main()
