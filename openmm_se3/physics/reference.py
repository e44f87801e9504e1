"""Reference values by density functional theory, computed by ``benchmarks/dft_reference/compute.py``; the file states how."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from ase import Atoms

from openmm_se3.physics.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_HARTREE

_FILE = Path(__file__).parent / "dft_reference.json"


@dataclass(frozen=True)
class ReferenceMolecule:
    """A molecule at its DFT minimum (Angstrom), and harmonic wavenumbers ``(n_modes,)``, 1/cm, ascending."""

    atoms: Atoms
    wavenumbers: np.ndarray


@dataclass(frozen=True)
class ReferenceCurve:
    """DFT energies along a path.

    Attributes
    ----------
    coordinate, unit : str
        What the path varies.
    values : ndarray
        ``(n,)`` of the coordinate.
    symbols : list of str
        ``(n_atoms,)``.
    positions_nm : ndarray
        ``(n, n_atoms, 3)``.
    energies : ndarray
        ``(n,)`` total energies, kJ/mol.
    """

    coordinate: str
    unit: str
    values: np.ndarray
    symbols: list[str]
    positions_nm: np.ndarray
    energies: np.ndarray


@cache
def _data() -> dict:
    return json.loads(_FILE.read_text())


def level_of_theory() -> str:
    """Level of theory of all references."""
    return str(_data()["provenance"]["level_of_theory"])


def reference_molecules() -> dict[str, ReferenceMolecule]:
    """Molecules with frequencies, by name."""
    return {
        name: ReferenceMolecule(Atoms(m["symbols"], positions=m["positions_angstrom"]), np.array(m["wavenumbers_per_cm"]))
        for name, m in _data()["molecules"].items()
        if "wavenumbers_per_cm" in m
    }


def reference_curve(name: str) -> ReferenceCurve:
    """A curve by name.

    Parameters
    ----------
    name : str
        Such as ``water O-H``.

    Returns
    -------
    ReferenceCurve
        Positions in nm, total energies in kJ/mol; values in the unit that it names, Angstrom or degrees.

    Raises
    ------
    KeyError
        If there is none of that name.
    """
    c = _data()["curves"][name]
    return ReferenceCurve(
        c["coordinate"],
        c["unit"],
        np.array(c["values"]),
        c["symbols"],
        np.array(c["positions_angstrom"]) / ANGSTROM_PER_NM,
        np.array(c["energies_hartree"]) * KJ_PER_MOL_PER_HARTREE,
    )
