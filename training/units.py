"""The only numbers with units in the project: everything derives from the CODATA constants of `ase.units`.

Inside `training`: Angstrom, eV, eV/Angstrom. At the boundary of an exported model: nm, kJ/mol, kJ/mol/nm.
"""

from ase import units as _ase

ANGSTROM_PER_NM = _ase.nm / _ase.Angstrom
KJ_PER_MOL_PER_EV = _ase.eV * _ase.mol / _ase.kJ
KCAL_PER_MOL_PER_EV = _ase.eV * _ase.mol / _ase.kcal

#: eV per unit, for every energy unit that a data file may state.
ENERGY_UNITS: dict[str, float] = {
    "eV": 1.0,
    "meV": 1e-3,
    "Hartree": _ase.Hartree,
    "kcal/mol": _ase.kcal / _ase.mol,
    "kJ/mol": _ase.kJ / _ase.mol,
}

#: Angstrom per unit, for every length unit that a data file may state.
LENGTH_UNITS: dict[str, float] = {"Angstrom": 1.0, "nm": _ase.nm, "Bohr": _ase.Bohr}

_ALIASES = {"hartree": "Hartree", "ha": "Hartree", "ev": "eV", "mev": "meV", "kcal/mol": "kcal/mol", "kj/mol": "kJ/mol"}
_LENGTH_ALIASES = {"angstrom": "Angstrom", "a": "Angstrom", "å": "Angstrom", "nm": "nm", "bohr": "Bohr"}


def energy_factor(unit: str) -> float:
    """EV per `unit`.

    Raises
    ------
    ValueError
        If the unit is unknown; the message lists those that are known.
    """
    try:
        return ENERGY_UNITS[_ALIASES[unit.strip().lower()]]
    except KeyError:
        raise ValueError(f"unknown energy unit {unit!r}; expected one of {', '.join(ENERGY_UNITS)}") from None


def length_factor(unit: str) -> float:
    """Angstrom per `unit`; raises like `energy_factor`."""
    try:
        return LENGTH_UNITS[_LENGTH_ALIASES[unit.strip().lower()]]
    except KeyError:
        raise ValueError(f"unknown length unit {unit!r}; expected one of {', '.join(LENGTH_UNITS)}") from None


def force_factor(unit: str) -> float:
    """EV/Angstrom per `unit`, which reads energy/length, such as ``Hartree/Angstrom`` or ``kcal/mol/Angstrom``."""
    energy, _, length = unit.strip().rpartition("/")
    if not energy:
        raise ValueError(f"force unit {unit!r} is not of the form energy/length, such as 'eV/Angstrom'")
    return energy_factor(energy) / length_factor(length)
