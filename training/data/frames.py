"""What every reader yields, and the errors that they share."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from ase.formula import Formula
from ase.symbols import Symbols

#: Energies of one isolated atom in two files differ by no more than their rounding, eV.
SAME_ENERGY = 1e-4
#: What frames say of their charge and spin, and the values of a neutral closed shell. ``spin`` is 2S to some and 2S + 1 to others.
_CHARGES = {"charge": (0,), "total_charge": (0,)}
_SPINS = {"spin_multiplicity": (1,), "multiplicity": (1,), "spin": (0, 1)}


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
        Atomic number to energy in eV, from frames of one atom; the first of each element.
    contradictions : list of str
        Isolated atoms whose energy is not that of an earlier one of the same element, in words.
    levels_of_theory : list of str
        What the files say of their labels, each level once, in the order of the files.
    """

    skipped: dict[str, int] = field(default_factory=dict)
    isolated_atoms: dict[int, float] = field(default_factory=dict)
    contradictions: list[str] = field(default_factory=list)
    levels_of_theory: list[str] = field(default_factory=list)

    @property
    def level_of_theory(self) -> str | None:
        """All levels in one line; None if no file says anything."""
        return "; ".join(self.levels_of_theory) or None

    def skip(self, reason: str, count: int) -> None:
        """Count `count` frames that are left out for `reason`."""
        if count:
            self.skipped[reason] = self.skipped.get(reason, 0) + int(count)

    def isolated_atom(self, atomic_number: int, energy: float, place: str) -> None:
        """Add the energy in eV of an isolated atom that was met at `place`."""
        known = self.isolated_atoms.setdefault(atomic_number, energy)
        if abs(known - energy) > SAME_ENERGY:
            self.contradictions.append(f"{place} gives {chemical_symbols[atomic_number]} {energy:.6f} eV, one before it {known:.6f} eV")

    def labelled_by(self, level: str | None) -> None:
        """Add what one file says of its labels, if it says anything."""
        if level is not None and level not in self.levels_of_theory:
            self.levels_of_theory.append(level)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a metadata file."""
        isolated = {chemical_symbols[z]: e for z, e in self.isolated_atoms.items()}
        return {"skipped": self.skipped, "isolated_atoms": isolated, "level_of_theory": self.level_of_theory}


def hill_formula(atomic_numbers: np.ndarray) -> str:
    """Hill formula of a molecule, such as ``C2H6O``."""
    return Formula(Symbols(np.asarray(atomic_numbers, dtype=int)).get_chemical_formula(mode="hill")).format("hill")


def charge_or_spin(info: dict[str, Any], n_atoms: int) -> str | None:
    """What a frame says of itself, such as ``charge=1``, if that is another state than the neutral closed-shell one that models know.

    Parameters
    ----------
    info : dict
        Of the frame, as ASE reads it.
    n_atoms : int
        A single atom may have any spin: most have unpaired electrons.
    """
    for name, neutral in (_CHARGES | (_SPINS if n_atoms > 1 else {})).items():
        value = np.asarray(info.get(name, neutral[0]))
        if value.dtype.kind in "iuf" and not np.isclose(value.reshape(-1, 1), neutral, atol=1e-3).any(1).all():
            return f"{name}={info[name]}"
    return None


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
