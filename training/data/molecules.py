"""Which molecules a conformation consists of: a pair has a formula of its own, and a split by formula says nothing of its halves."""

from functools import lru_cache

import numpy as np
from ase.data import covalent_radii

from training.data.frames import hill_formula
from training.data.packed import PackedDataset

#: Atoms nearer than so many times the sum of their covalent radii are of one molecule.
BONDED = 1.3
#: Pairs of atoms that are looked at at once.
PAIRS_AT_ONCE = 2_000_000


def formulas_of_parts(atomic_numbers: np.ndarray, coordinates: np.ndarray) -> list[set[str]]:
    """Hill formulas of the molecules of conformations of several molecules; of a single molecule none.

    Parameters
    ----------
    atomic_numbers : ndarray
        ``(n_frames, n_atoms)``.
    coordinates : ndarray
        ``(n_frames, n_atoms, 3)`` Angstrom.
    """
    n_frames, n_atoms = atomic_numbers.shape
    found: list[set[str]] = [set() for _ in range(n_frames)]
    at_once = max(1, PAIRS_AT_ONCE // n_atoms**2)
    for start in range(0, n_frames, at_once):
        numbers, x = atomic_numbers[start : start + at_once], coordinates[start : start + at_once]
        radii = covalent_radii[numbers]
        squares = np.square(x[:, :, None] - x[:, None]).sum(-1)
        bonded = squares < np.square(BONDED * (radii[:, :, None] + radii[:, None]))
        left = np.ones_like(numbers, dtype=bool)
        frames = np.flatnonzero(~_molecule_of(bonded, left).all(1))  # most are single molecules
        while len(frames):
            members = _molecule_of(bonded[frames], left[frames])
            for frame, atoms in zip(frames, members, strict=True):
                found[start + frame].add(_formula(np.sort(numbers[frame, atoms]).tobytes()))
            left[frames] &= ~members
            frames = frames[left[frames].any(1)]
    return found


def _molecule_of(bonded: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Atoms of the molecule of the first atom that is left, ``(n_frames, n_atoms)`` bool, by bonds ``(n_frames, n_atoms, n_atoms)``."""
    reached = bonded[np.arange(len(left)), left.argmax(1)]
    while True:
        further: np.ndarray = (bonded & reached[:, None, :]).any(2)
        if np.array_equal(further, reached):
            return further
        reached = further


@lru_cache(maxsize=100_000)
def _formula(numbers: bytes) -> str:
    return hill_formula(np.frombuffer(numbers, dtype=np.uint8))


def formulas_trained_on_in_parts(dataset: PackedDataset) -> set[str]:
    """Formulas that frames of the training split have as one of several molecules."""
    frames = dataset.indices("train")
    out: set[str] = set()
    of_frame = dataset.formula_index[frames]
    for index in np.unique(of_frame):
        chosen = frames[of_frame == index]
        size = int(dataset.offsets[chosen[0] + 1] - dataset.offsets[chosen[0]])
        atoms = dataset.offsets[chosen][:, None] + np.arange(size)
        out = out.union(*formulas_of_parts(dataset.numbers[atoms], dataset.coordinates[atoms]))
    return out


def frames_tested_on_parts(dataset: PackedDataset) -> int:
    """How many frames of the test split have a formula that training frames have as one of several molecules."""
    tested = dataset.indices("test")
    if not len(tested):
        return 0
    parts = formulas_trained_on_in_parts(dataset)
    known = [i for i, formula in enumerate(dataset.metadata["formulas"]) if formula in parts]
    return int(np.isin(dataset.formula_index[tested], known).sum())
