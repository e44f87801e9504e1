"""Which frames a model is trained on, which choose it, and which test it."""

import hashlib

import numpy as np

from training.data.frames import DataError

SPLITS = ("train", "validation", "test")
#: In place of a split, until the rule of splitting has decided.
NOT_GIVEN = 255
#: In place of a split, of frames that none may have: a molecule of theirs is held out.
LEFT_OUT = 254
#: What metadata say of how the data were split: a run that goes on needs the same.
SPLIT_KEYS = ("split_by", "split_seed", "split_fractions", "split_files", "split_sha256", "hold_out_molecules")


def split_of(formula: str, fractions: dict[str, float], seed: int) -> str:
    """Assign a formula to a split by its hash: stable whatever else is in the data.

    Parameters
    ----------
    formula : str
        Hill formula; all frames of a formula share a split, so no molecule is both trained on and tested.
    fractions : dict
        ``validation`` and ``test`` fractions of the formulas; the rest is ``train``.
    seed : int
        Another seed gives another assignment.
    """
    digest = hashlib.sha256(f"{seed}:{formula}".encode()).digest()
    x = int.from_bytes(digest[:8], "big") / 2**64
    if x < fractions.get("test", 0.0):
        return "test"
    return "validation" if x < fractions.get("test", 0.0) + fractions.get("validation", 0.0) else "train"


def split_frames(identities: np.ndarray, fractions: dict[str, float], seed: int, fill: bool = True) -> np.ndarray:
    """Split frames one by one, as data of a single molecule must be: at random, a function of the seed; copies of a frame go together.

    Parameters
    ----------
    identities : ndarray
        ``(n_frames,)`` numbers, equal for equal frames only.
    fractions : dict
        ``validation`` and ``test`` fractions of the distinct frames; the rest is ``train``.
    seed : int
        Of the draw.
    fill : bool
        Give each split with a fraction above zero a frame, as long as there are enough of them.

    Returns
    -------
    ndarray
        ``(n_frames,)`` uint8 index into `SPLITS`.
    """
    _, first, which = np.unique(identities, return_index=True, return_inverse=True)
    n = len(first)
    counts = {split: round(fractions.get(split, 0.0) * n) for split in ("test", "validation")}
    if fill:
        counts = {split: max(count, 1) if fractions.get(split, 0.0) > 0 else count for split, count in counts.items()}
        while sum(counts.values()) >= n:  # something must be left to train on
            counts[max(counts, key=lambda split: counts[split])] -= 1
    # Distinct frames are numbered as they first come, so that data without copies are split as if nobody had looked for them.
    order = np.argsort(first, kind="stable")[np.random.default_rng(seed).permutation(n)]
    held, of_distinct = 0, np.full(n, SPLITS.index("train"), dtype=np.uint8)
    for split, count in counts.items():
        of_distinct[order[held : held + count]] = SPLITS.index(split)
        held += count
    return of_distinct[which]


def complete_split(given: np.ndarray, identities: np.ndarray, by_formula: np.ndarray | None, fractions: dict[str, float], seed: int) -> np.ndarray:
    """Split of every frame: the one that it was given, else that of the rule.

    Parameters
    ----------
    given : ndarray
        ``(n_frames,)`` uint8 index into `SPLITS`, or `NOT_GIVEN`.
    identities : ndarray
        ``(n_frames,)`` numbers, equal for equal frames only.
    by_formula : ndarray or None
        ``(n_frames,)`` uint8 that `split_of` says; None for `split_frames` of those without a split.
    fractions, seed
        Of the rule.

    Returns
    -------
    ndarray
        ``(n_frames,)`` uint8 index into `SPLITS`.

    Raises
    ------
    DataError
        If a frame is in two splits.
    """
    split, free = given.copy(), given == NOT_GIVEN
    split[free] = split_frames(identities[free], fractions, seed) if by_formula is None else by_formula[free]
    _, first, which = np.unique(identities, return_index=True, return_inverse=True)
    of_first = split[first][which]
    twice = split != of_first
    if twice.any():
        other, own = (SPLITS[s[twice.argmax()]] for s in (of_first, split))
        raise DataError(
            f"{int(twice.sum())} frames are in two splits, the first of them as {other} and as {own}: a model would be tested on what it was "
            "trained on; leave them out of one of the files"
        )
    return split
