"""Formulas that new data must not hold, so that models trained on them can be tested honestly."""

from pathlib import Path

import numpy as np
from ase import Atoms

from training.data.frames import hill_formula
from training.data.molecules import formulas_of_parts
from training.data.packed import PackedDataset
from training.data.prepare import formulas_of_file
from training.data.splits import split_of


class HeldOut:
    """Tells whether a molecule, or one of several in a cluster, is held out.

    Parameters
    ----------
    sources : sequence of str
        Data files, all of whose formulas are held out, and packed data sets, whose rule of splitting decides about every formula, those that
        are not in them included.

    Raises
    ------
    DataError
        For a source that is neither.
    """

    def __init__(self, sources: tuple[str, ...]) -> None:
        self._formulas: set[str] = set()
        self._rules: list[tuple[dict[str, float], int]] = []
        for source in sources:
            path = Path(source)
            if path.is_dir():
                dataset = PackedDataset(path)
                metadata = dataset.metadata
                if metadata.get("split_by") == "frame":  # no formula of it belongs to training alone
                    self._formulas |= set(metadata["formulas"])
                else:
                    if dataset.split is not None:  # files of their own are held out, whatever the rule
                        self._formulas |= dataset.formulas_of(dataset.indices("validation")) | dataset.formulas_of(dataset.indices("test"))
                    self._rules.append((metadata["split_fractions"], metadata["split_seed"]))
            else:
                self._formulas |= formulas_of_file(path)

    def __contains__(self, atoms: Atoms) -> bool:
        """Whether the formula of `atoms` is held out, or that of one of the molecules that they are."""
        (parts,) = formulas_of_parts(atoms.numbers[None].astype(np.uint8), atoms.positions[None])
        return any(map(self._is_held_out, {hill_formula(atoms.numbers), *parts}))

    def _is_held_out(self, formula: str) -> bool:
        return formula in self._formulas or any(split_of(formula, fractions, seed) != "train" for fractions, seed in self._rules)
