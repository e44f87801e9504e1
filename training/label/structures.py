"""What is to be labelled: molecules from SMILES, with conformers by RDKit, or geometries from files."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.io import read
from rdkit import Chem, rdBase
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers
from scipy.spatial.distance import pdist

from training.data.extxyz import require_whole
from training.data.frames import DataError, charge_or_spin
from training.label.errors import LabelError

#: Pairs closer than this part of the sum of their covalent radii are no molecule: H-H 0.37, C-H 0.64, C-C 0.91 Angstrom.
CLOSEST_CONTACT = 0.6
_IMPLAUSIBLE = "has no atoms, coordinates that are not finite, or atoms on top of each other"


@dataclass(frozen=True)
class Molecule:
    """One entry of the input.

    Attributes
    ----------
    name : str
        SMILES, or file and number of the frame.
    symbols : frozenset of str
        Chemical elements in it.
    smiles : str or None
        To make conformers of.
    atoms : ase.Atoms or None
        The geometry, where a file gave it.
    """

    name: str
    symbols: frozenset[str]
    smiles: str | None = None
    atoms: Atoms | None = None


def read_molecules(inputs: list[str]) -> list[Molecule]:
    """Molecules of SMILES texts, ``.smi`` files (a SMILES at the beginning of each line but comments) and structure files, all frames.

    RDKit reads ``.sdf`` and ``.mol``, which tell of charges and radicals, ASE the rest.

    Raises
    ------
    LabelError
        For input that is none of these, a periodic frame, a charged or open-shell molecule, or one with atoms of no element.
    """
    molecules: list[Molecule] = []
    for text in inputs:
        path = Path(text)
        if not os.path.isfile(path):  # which a SMILES may be too long to ask of a Path
            molecules.append(_from_smiles(text, f"{text!r} is neither an existing file nor a SMILES"))
        elif path.suffix.lower() == ".smi":
            try:
                lines = [line.split() for line in path.read_text().splitlines()]
            except UnicodeDecodeError as error:
                raise LabelError(f"{path}: no text of SMILES ({error})") from None
            texts = [(i + 1, line[0]) for i, line in enumerate(lines) if line and not line[0].startswith("#")]
            molecules.extend(_from_smiles(smiles, f"{path}, line {i}: {smiles!r} is no SMILES") for i, smiles in texts)
        elif path.suffix.lower() in (".sdf", ".mol"):
            molecules.extend(_from_mol_blocks(path))
        else:
            molecules.extend(_from_file(path))
    if not molecules:
        raise LabelError("no structure given; give SMILES, .smi files or structure files")
    return molecules


def _from_smiles(smiles: str, complaint: str) -> Molecule:
    with rdBase.BlockLogs():
        parsed = Chem.MolFromSmiles(smiles) if smiles else None
    if parsed is None or parsed.GetNumAtoms() == 0:
        raise LabelError(f"{complaint} that RDKit understands")
    _require_neutral_closed_shell(parsed, smiles)
    symbols = frozenset(atom.GetSymbol() for atom in Chem.AddHs(parsed).GetAtoms())
    return Molecule(smiles, symbols, smiles=smiles)


def _require_neutral_closed_shell(molecule: Chem.Mol, name: str) -> None:
    if any(atom.GetAtomicNum() == 0 for atom in molecule.GetAtoms()):
        raise LabelError(f"{name} has atoms of no element (*); give a whole molecule, every atom of it named")
    if Chem.GetFormalCharge(molecule) or any(atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms()):
        raise LabelError(f"{name} is charged or has unpaired electrons; models know neither charge nor spin: give neutral closed-shell molecules")


def _from_mol_blocks(path: Path) -> list[Molecule]:
    """All records of an SDF or MOL file, with their geometries."""
    try:
        with rdBase.BlockLogs():
            records = list(Chem.SDMolSupplier(str(path), removeHs=False))
    except OSError as error:
        raise LabelError(f"{path}: RDKit cannot read it ({error})") from None
    molecules = []
    for i, record in enumerate(records):
        name = f"{path.name}#{i}"
        if record is None:
            raise LabelError(f"{path}: RDKit cannot read record {i} as a molecule; correct or remove it")
        _require_neutral_closed_shell(record, f"{path}: record {i}")
        if any(atom.GetTotalNumHs() for atom in record.GetAtoms()):
            raise LabelError(f"{path}: record {i} lacks hydrogens; give structures with all atoms, or SMILES")
        atoms = Atoms([atom.GetAtomicNum() for atom in record.GetAtoms()], record.GetConformer().GetPositions())
        if not is_plausible(atoms):
            raise LabelError(f"{path}: record {i} {_IMPLAUSIBLE}")
        molecules.append(Molecule(name, frozenset(atoms.get_chemical_symbols()), atoms=atoms))
    return molecules


def _from_file(path: Path) -> list[Molecule]:
    try:
        frames = read(path, index=":", do_not_split_by_at_sign=True)
    except Exception as error:  # ASE raises whatever the parser met
        raise LabelError(f"{path}: ASE cannot read it as a structure file ({type(error).__name__}: {error})") from error
    if path.suffix.lower() in (".xyz", ".extxyz"):
        try:
            require_whole(path, [len(atoms) for atoms in frames])
        except DataError as error:
            raise LabelError(str(error)) from None
    for i, atoms in enumerate(frames):
        if atoms.pbc.any():
            raise LabelError(f"{path}: frame {i} is periodic; training data must be molecules or clusters")
        if not is_plausible(atoms):
            raise LabelError(f"{path}: frame {i} {_IMPLAUSIBLE}")
        if not atoms.numbers.all():
            raise LabelError(f"{path}: frame {i} has atoms of no element (X); give a whole molecule, every atom of it named")
    states = [(i, state) for i, atoms in enumerate(frames) if (state := charge_or_spin(atoms.info, len(atoms))) is not None]
    if states:
        raise LabelError(
            f"{path}: {len(states)} of {len(frames)} frames are charged or have unpaired electrons, the first: frame {states[0][0]} has "
            f"{states[0][1]}; models know neither charge nor spin: remove these frames"
        )
    return [Molecule(f"{path.name}#{i}", frozenset(a.get_chemical_symbols()), atoms=Atoms(a.numbers, a.positions)) for i, a in enumerate(frames)]


def geometries(molecule: Molecule, n_conformers: int, seed: int) -> list[Atoms]:
    """Geometries to sample from: that of the file, or conformers.

    Conformers are embedded by ETKDGv3 (Wang et al., J. Chem. Inf. Model. 60, 2044 (2020)) and relaxed by MMFF94, or by UFF where
    MMFF94 lacks parameters.

    Returns
    -------
    list of ase.Atoms
        At most `n_conformers`; empty if RDKit cannot embed the molecule.
    """
    if molecule.smiles is None:
        assert molecule.atoms is not None
        return [molecule.atoms.copy()]
    return [atoms.copy() for atoms in _conformers(molecule.smiles, n_conformers, seed)]


@lru_cache(maxsize=256)  # dimers come back to the molecules that they are made of
def _conformers(smiles: str, n_conformers: int, seed: int) -> tuple[Atoms, ...]:
    with rdBase.BlockLogs():
        molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
        parameters = rdDistGeom.ETKDGv3()
        parameters.randomSeed = seed
        found = list(rdDistGeom.EmbedMultipleConfs(molecule, numConfs=n_conformers, params=parameters))
        if found:
            known = rdForceFieldHelpers.MMFFHasAllMoleculeParams(molecule)
            relax = rdForceFieldHelpers.MMFFOptimizeMoleculeConfs if known else rdForceFieldHelpers.UFFOptimizeMoleculeConfs
            relax(molecule, maxIters=1000)
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    made = [Atoms(numbers, molecule.GetConformer(i).GetPositions()) for i in found]
    return tuple(atoms for atoms in made if is_plausible(atoms))


def is_plausible(atoms: Atoms) -> bool:
    """Whether there are atoms, their coordinates are finite, and none sits on top of another."""
    if len(atoms) == 0 or not np.isfinite(atoms.positions).all():
        return False
    radii = covalent_radii[atoms.numbers]
    i, j = np.triu_indices(len(atoms), k=1)
    return bool((pdist(atoms.positions) > CLOSEST_CONTACT * (radii[i] + radii[j])).all())
