"""Which molecules a conformation consists of: a pair has a formula of its own, and a split by formula says nothing of its halves."""

from collections.abc import Iterator, Sequence, Set
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from ase.data import covalent_radii

from training.data.frames import hill_formula
from training.data.splits import SPLITS

#: Atoms nearer than so many times the sum of their covalent radii are of one molecule. No single number will do: at 1.3 two oxygen atoms in close
#: contact, 1.7 Angstrom, look bonded, and at 1.1 stretched bonds look broken. So a conformation has the molecules that it has at any of them; to the
#: atom that is nearest, by that measure, an atom is bonded at all of them.
BONDED = (1.1, 1.2, 1.3)
#: Pairs of atoms, and frames of a formula, that are looked at at once.
PAIRS_AT_ONCE, FRAMES_AT_ONCE = 2_000_000, 50_000
_NONE: Set[str] = frozenset()


class Frames(NamedTuple):
    """Arrays of a packed data set that tell its molecules."""

    numbers: np.ndarray
    coordinates: np.ndarray
    offsets: np.ndarray
    formula_index: np.ndarray


def formulas_of_parts(atomic_numbers: np.ndarray, coordinates: np.ndarray) -> list[Set[str]]:
    """Hill formulas of the molecules of conformations of several molecules, at any of `BONDED`; of a single molecule none.

    Parameters
    ----------
    atomic_numbers : ndarray
        ``(n_frames, n_atoms)``.
    coordinates : ndarray
        ``(n_frames, n_atoms, 3)`` Angstrom.
    """
    n_frames, n_atoms = atomic_numbers.shape
    found: dict[int, set[str]] = {}
    at_once = max(1, PAIRS_AT_ONCE // n_atoms**2)
    for start in range(0, n_frames, at_once):
        numbers, x = atomic_numbers[start : start + at_once], coordinates[start : start + at_once]
        radii = covalent_radii[numbers]
        apart = np.square(x[:, :, None] - x[:, None]).sum(-1) / np.square(radii[:, :, None] + radii[:, None])
        nearest = _nearest(apart) & (apart < max(BONDED) ** 2)
        frames = np.arange(start, start + len(numbers))
        for times in BONDED:  # what is a single molecule at one of them is so at the larger ones
            bonded = nearest | (apart < times**2)
            several = np.flatnonzero(~_molecule_of(bonded, np.ones_like(numbers, dtype=bool)).all(1))  # most are single molecules
            frames, numbers, apart, nearest = frames[several], numbers[several], apart[several], nearest[several]
            _add_formulas(found, frames, numbers, bonded[several], radicals=times == max(BONDED))
    return [found.get(frame, _NONE) for frame in range(n_frames)]


def _nearest(apart: np.ndarray) -> np.ndarray:
    """Pairs ``(n_frames, n_atoms, n_atoms)`` bool of which one is the nearest of the other, and each atom with itself."""
    n_atoms = apart.shape[-1]
    others = np.where(np.eye(n_atoms, dtype=bool), np.inf, apart)
    pairs: np.ndarray = np.arange(n_atoms) == others.argmin(2)[..., None]
    return pairs | pairs.transpose(0, 2, 1) | np.eye(n_atoms, dtype=bool)


def _add_formulas(found: dict[int, set[str]], frames: np.ndarray, numbers: np.ndarray, bonded: np.ndarray, radicals: bool) -> None:
    """Add the formulas of all parts; without `radicals` not of those with an odd number of electrons, which a stretched bond leaves."""
    left = np.ones_like(numbers, dtype=bool)
    rows = np.arange(len(frames))
    while len(rows):
        members = _molecule_of(bonded[rows], left[rows])
        for row, atoms in zip(rows, members, strict=True):
            of_part = numbers[row, atoms]
            if radicals or of_part.sum() % 2 == 0:
                found.setdefault(int(frames[row]), set()).add(_formula(np.sort(of_part).tobytes()))
        left[rows] &= ~members
        rows = rows[left[rows].any(1)]


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


def parts_by_formula(data: Frames, frames: np.ndarray) -> Iterator[tuple[np.ndarray, list[Set[str]]]]:
    """Those of `frames` that share a formula, some thousands at a time, and what `formulas_of_parts` says of each; one formula after another."""
    of_frame = data.formula_index[frames]
    for index in np.unique(of_frame):
        of_formula = frames[of_frame == index]
        size = int(data.offsets[of_formula[0] + 1] - data.offsets[of_formula[0]])
        for start in range(0, len(of_formula), FRAMES_AT_ONCE):
            chosen = of_formula[start : start + FRAMES_AT_ONCE]
            atoms = data.offsets[chosen][:, None] + np.arange(size)
            yield chosen, formulas_of_parts(data.numbers[atoms], data.coordinates[atoms])


def frames_with_held_out_molecules(data: Frames, formulas: Sequence[str], split: np.ndarray) -> np.ndarray:
    """Frames, ``(n_frames,)`` bool, that have a molecule, alone or as one of several, whose formula is held out from them.

    Formulas of the test split are held out from those that choose a model, and those of both from those trained on; frames that choose a model and
    are left out for that hold nothing out.

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
        held_out = {formulas[i] for i in np.unique(data.formula_index[later & ~found])}
        for frames, parts in parts_by_formula(data, np.flatnonzero(earlier)):
            whole = formulas[data.formula_index[frames[0]]]
            found[frames] = [not held_out.isdisjoint(molecules | {whole}) for molecules in parts]
    return found
