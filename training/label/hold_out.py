"""Formulas that new data must not hold, so that models trained on them can be tested honestly."""

from pathlib import Path

from ase import Atoms

from training.data.frames import ReadReport, hill_formula
from training.data.packed import PackedDataset
from training.data.prepare import open_blocks
from training.data.splits import split_of


class HeldOut:
    """Tells whether a molecule is held out.

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
                self._formulas |= {block.formula for block in open_blocks(path, ReadReport(), energies_only=True)}

    def __contains__(self, atoms: Atoms) -> bool:
        formula = hill_formula(atoms.numbers)
        return formula in self._formulas or any(split_of(formula, fractions, seed) != "train" for fractions, seed in self._rules)
