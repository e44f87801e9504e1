"""What every reader yields, and the errors that they share."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from ase.formula import Formula
from ase.symbols import Symbols


class DataError(ValueError):
    """A data file does not hold what was asked of it; the message says what, where and what to do."""


@dataclass
class FrameBlock:
    """Frames of one molecule (or one composition) that share their atoms, in eV and Angstrom.

    Attributes
    ----------
    formula : str
        Hill formula; splits keep a formula in one part.
    atomic_numbers : ndarray
        ``(n_atoms,)`` uint8.
    coordinates : ndarray
        ``(n_frames, n_atoms, 3)`` float32, Angstrom.
    energies : ndarray
        ``(n_frames,)`` float64 total energies, eV.
    forces : ndarray or None
        ``(n_frames, n_atoms, 3)`` float32, eV/Angstrom.
    group : str
        Name of the HDF5 group that the frames come from: where a file has one per molecule, that tells isomers apart.
    """

    formula: str
    atomic_numbers: np.ndarray
    coordinates: np.ndarray
    energies: np.ndarray
    forces: np.ndarray | None
    group: str = ""


@dataclass
class ReadReport:
    """What a reader met on its way, filled while it streams.

    Attributes
    ----------
    skipped : dict
        Reason to number of frames that were left out.
    isolated_atoms : dict
        Atomic number to energy in eV, from frames that declare themselves isolated atoms.
    levels_of_theory : list of str
        What the files say of their labels, each level once, in the order of the files.
    """

    skipped: dict[str, int] = field(default_factory=dict)
    isolated_atoms: dict[int, float] = field(default_factory=dict)
    levels_of_theory: list[str] = field(default_factory=list)

    @property
    def level_of_theory(self) -> str | None:
        """All levels in one line; None if no file says anything."""
        return "; ".join(self.levels_of_theory) or None

    def skip(self, reason: str, count: int) -> None:
        """Count `count` frames that are left out for `reason`."""
        if count:
            self.skipped[reason] = self.skipped.get(reason, 0) + int(count)

    def labelled_by(self, level: str | None) -> None:
        """Add what one file says of its labels, if it says anything."""
        if level is not None and level not in self.levels_of_theory:
            self.levels_of_theory.append(level)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a metadata file."""
        return {"skipped": self.skipped, "isolated_atoms": self.isolated_atoms, "level_of_theory": self.level_of_theory}


def hill_formula(atomic_numbers: np.ndarray) -> str:
    """Hill formula of a molecule, such as ``C2H6O``."""
    return Formula(Symbols(np.asarray(atomic_numbers, dtype=int)).get_chemical_formula(mode="hill")).format("hill")


def keep_finite(block: FrameBlock, report: ReadReport) -> FrameBlock | None:
    """Drop frames with a NaN or infinite coordinate, energy or force, and count them.

    ANI-1x marks properties that were not computed for a conformation with NaN.
    """
    good = np.isfinite(block.coordinates).all((1, 2)) & np.isfinite(block.energies)
    report.skip("energy or coordinates not finite", (~good).sum())
    if block.forces is not None:
        finite_forces = np.isfinite(block.forces).all((1, 2))
        report.skip("forces not finite", (good & ~finite_forces).sum())
        good &= finite_forces
    if good.all():
        return block
    if not good.any():
        return None
    forces = None if block.forces is None else block.forces[good]
    return replace(block, coordinates=block.coordinates[good], energies=block.energies[good], forces=forces)
