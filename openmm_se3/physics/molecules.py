"""The molecules that are measured."""

from pathlib import Path

from ase import Atoms
from ase.build import molecule
from ase.io import read

#: RDKit's ETKDG conformer of CC(=O)Nc1ccc(O)cc1 after MMFF: 20 atoms with all of H, C, N and O. Measures start from the model's own minimum.
_PARACETAMOL = Path(__file__).parent / "paracetamol.xyz"
_G2 = {"water": "H2O", "methane": "CH4", "ammonia": "NH3", "ethanol": "CH3CH2OH"}


def molecule_names() -> list[str]:
    """Names that `starting_structure` knows."""
    return [*_G2, "paracetamol"]


def starting_structure(name: str) -> Atoms:
    """A molecule near its minimum, without a box.

    Parameters
    ----------
    name : str
        One of `molecule_names`.

    Returns
    -------
    ase.Atoms
        Positions in Angstrom.

    Raises
    ------
    ValueError
        For another name; the message lists those there are.
    """
    if name == "paracetamol":
        return read(_PARACETAMOL)
    if name not in _G2:
        raise ValueError(f"no molecule {name!r}; there are {', '.join(molecule_names())}")
    return molecule(_G2[name])
