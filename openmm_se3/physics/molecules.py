"""The molecules that are measured, and their OpenMM topology."""

from pathlib import Path

from ase import Atoms
from ase.build import molecule
from ase.io import read
from openmm import app

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


def topology_of(atoms: Atoms) -> app.Topology:
    """Topology of one molecule, without bonds, which the model does not need."""
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for i, symbol in enumerate(atoms.get_chemical_symbols()):
        topology.addAtom(f"{symbol}{i + 1}", app.Element.getBySymbol(symbol), residue)
    return topology
