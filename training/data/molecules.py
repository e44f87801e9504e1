"""Which molecules a conformation consists of: a pair has a formula of its own, and a split by formula says nothing of its halves."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from ase.data import covalent_radii

from training.data.frames import hill_formula
from training.data.splits import SPLITS

#: Atoms nearer than so many times the sum of their covalent radii are of one molecule.
BONDED = 1.3
#: Pairs of atoms that are looked at at once.
PAIRS_AT_ONCE = 2_000_000


class Frames(NamedTuple):
    """Arrays of a packed data set that tell its molecules."""

    numbers: np.ndarray
    coordinates: np.ndarray
    offsets: np.ndarray
    formula_index: np.ndarray


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


def parts_by_formula(data: Frames, frames: np.ndarray) -> Iterator[tuple[np.ndarray, list[set[str]]]]:
    """Those of `frames` that share a formula, and what `formulas_of_parts` says of each; one formula after another."""
    of_frame = data.formula_index[frames]
    for index in np.unique(of_frame):
        chosen = frames[of_frame == index]
        size = int(data.offsets[chosen[0] + 1] - data.offsets[chosen[0]])
        atoms = data.offsets[chosen][:, None] + np.arange(size)
        yield chosen, formulas_of_parts(data.numbers[atoms], data.coordinates[atoms])


def frames_with_held_out_molecules(data: Frames, formulas: Sequence[str], split: np.ndarray) -> np.ndarray:
    """Frames, ``(n_frames,)`` bool, that have a molecule, alone or as one of several, whose formula is held out from them.

    Formulas of the test split are held out from those that choose a model, and of both from those trained on.

    Parameters
    ----------
    data : Frames
        All frames.
    formulas : sequence of str
        Those that ``data.formula_index`` numbers.
    split : ndarray
        ``(n_frames,)`` index into `SPLITS`.
    """
    found = np.zeros(len(split), dtype=bool)
    test, validation, train = (split == SPLITS.index(name) for name in ("test", "validation", "train"))
    for later, earlier in ((test, validation), (test | validation, train)):
        held_out = {formulas[i] for i in np.unique(data.formula_index[later])}
        for frames, parts in parts_by_formula(data, np.flatnonzero(earlier)):
            whole = formulas[data.formula_index[frames[0]]]
            found[frames] = [not held_out.isdisjoint(molecules | {whole}) for molecules in parts]
    return found
