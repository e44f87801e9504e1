"""Reference energies per element: fitted, given, or those of isolated atoms; subtracted in float64."""

from typing import Any

import numpy as np
from ase.data import chemical_symbols

from training.data.frames import DataError
from training.units import ENERGY_UNITS

#: A chemical residual is a few eV per atom at most (binding against free atoms: about -2 to -7; a fit: a few tenths).
MAX_MEAN_PER_ATOM = 15.0
MAX_STD_PER_ATOM = 2.5


class SelfEnergyFit:
    """Streaming least squares E ~ sum_z n_z e_z through the normal equations, in float64."""

    def __init__(self) -> None:
        self._normal = np.zeros((119, 119))
        self._right = np.zeros(119)

    def add(self, atomic_numbers: np.ndarray, n_frames: int, energy: float) -> None:
        """Add frames of one molecule: ``(n_atoms,)``, how many, and the sum of their energies, eV."""
        counts = np.bincount(atomic_numbers, minlength=119).astype(float)
        self._normal += np.outer(counts, counts) * n_frames
        self._right += counts * energy

    @property
    def elements(self) -> list[int]:
        """Atomic numbers met so far."""
        return [int(z) for z in np.flatnonzero(np.diag(self._normal))]

    @property
    def determined(self) -> bool:
        """Whether the compositions tell all elements apart, which those of few molecules do not."""
        z = self.elements
        scale = np.sqrt(np.diag(self._normal)[z])
        return bool(np.linalg.matrix_rank(self._normal[np.ix_(z, z)] / np.outer(scale, scale), tol=1e-9) == len(z))

    def solve(self) -> dict[int, float]:
        """Self-energies in eV; minimum norm where the compositions do not determine them all."""
        z = self.elements
        solution = np.linalg.lstsq(self._normal[np.ix_(z, z)], self._right[z], rcond=1e-12)[0]
        return dict(zip(z, solution.tolist(), strict=True))


def suspicious_unit(metadata: dict[str, Any]) -> str | None:
    """What a fitted self-energy of hydrogen says against the unit of the energies, if anything: at any level of theory it is near -0.5 Hartree.

    Parameters
    ----------
    metadata : dict
        Of a packed data set.
    """
    hydrogen = metadata["self_energies"].get("H")
    if metadata["self_energies_origin"] != "least squares" or not metadata["self_energies_determined"] or hydrogen is None:
        return None
    for name, factor in ENERGY_UNITS.items():
        # Relative energies have any self-energy near zero; total ones, of a fit, are within a third of this.
        if name != "eV" and abs(hydrogen / (-0.58 * ENERGY_UNITS["Hartree"] / factor) - 1) < 0.3:
            return f"the self-energy of hydrogen is {hydrogen:.4g} eV, which it would be in {name} were that taken for eV: is the energy unit right?"
    return None


def require_all_elements(self_energies: dict[int, float], elements: list[int], origin: str) -> None:
    """Refuse self-energies that lack an element of the data.

    Raises
    ------
    DataError
        Naming the missing elements and the remedy.
    """
    missing = [chemical_symbols[z] for z in elements if z not in self_energies]
    if missing:
        raise DataError(f"{origin} lacks self-energies of {', '.join(missing)}; give them in a table, or use least squares")


def check_residual(mean_per_atom: float, std_per_atom: float, origin: str) -> None:
    """Refuse self-energies that leave a residual which no chemistry can.

    Parameters
    ----------
    mean_per_atom, std_per_atom : float
        Mean and standard deviation of (E - sum of self-energies) / n_atoms over the frames, eV.
    origin : str
        How the self-energies were come by, for the message.

    Raises
    ------
    DataError
        With the numbers and the usual reasons.
    """
    if not (abs(mean_per_atom) <= MAX_MEAN_PER_ATOM and std_per_atom <= MAX_STD_PER_ATOM):  # what is not a number is refused, too
        raise DataError(
            f"after subtracting self-energies ({origin}) the energies are {mean_per_atom:.2f} +- {std_per_atom:.2f} eV per atom; "
            f"expected |mean| below {MAX_MEAN_PER_ATOM} and deviation below {MAX_STD_PER_ATOM}. "
            "Usual reasons: the energy unit is wrong, the self-energies belong to another level of theory, or energies were subtracted already."
        )
