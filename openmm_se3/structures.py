"""Read structure files into an OpenMM topology and positions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from openmm import Vec3, app, unit
from openmm.app.internal.unitcell import reducePeriodicBoxVectors

from openmm_se3.errors import UnsupportedSystemError

if TYPE_CHECKING:
    from ase import Atoms

SUFFIXES = (".pdb", ".cif", ".sdf", ".xyz")


def read_structure(path: str | Path, box_nm: Sequence[float] | None = None) -> tuple[app.Topology, np.ndarray]:
    """Read PDB, mmCIF, SDF or (extended) xyz.

    Parameters
    ----------
    path : str or Path
        The file; its suffix tells the format.
    box_nm : sequence of float, optional
        Edges of an orthorhombic periodic box (nm), in place of what the file says.

    Returns
    -------
    tuple
        Topology, with box vectors if the file has them or `box_nm` is given, and positions ``(n_atoms, 3)`` in nm.

    Raises
    ------
    UnsupportedSystemError
        If the file is missing, of another format, unreadable or without atoms.
    """
    path = Path(path)
    if not path.is_file():
        hint = "" if path.suffix else "; a structure file with coordinates is needed, such as RDKit or Open Babel make of a SMILES"
        raise UnsupportedSystemError(f"{path}: no such file{hint}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UnsupportedSystemError(f"{path}: unknown kind of structure file {suffix!r}; expected one of {', '.join(SUFFIXES)}")
    try:
        if suffix in (".pdb", ".cif"):
            with open(path) as text:
                file = app.PDBFile(text) if suffix == ".pdb" else app.PDBxFile(text)
            topology, positions = file.topology, np.array(file.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
        else:
            topology, positions = _read_with_ase(path, box_nm)
    except Exception as error:  # the parsers raise whatever they met
        raise UnsupportedSystemError(
            f"{path}: cannot be read as {suffix[1:]}, which its name says it is ({type(error).__name__}: {error})"
        ) from error
    if topology.getNumAtoms() == 0:
        raise UnsupportedSystemError(f"{path}: holds no atoms")
    if box_nm is not None:
        topology.setPeriodicBoxVectors(np.diag(box_nm) * unit.nanometer)
    return topology, positions


def _read_with_ase(path: Path, box_nm: Sequence[float] | None) -> tuple[app.Topology, np.ndarray]:
    from ase import units
    from ase.io import read

    atoms = read(path, index=0)
    if box_nm is not None:  # before bonds are looked for, which may cross the faces
        atoms.set_cell(np.array(box_nm) * (units.nm / units.Ang))
        atoms.pbc = True
    topology = topology_of(atoms)
    positions = atoms.positions
    if atoms.pbc.all():
        lower, rotation = atoms.cell.standard_form()
        positions = positions @ np.asarray(rotation).T
        vectors = [Vec3(*row) for row in np.asarray(lower) * (units.Ang / units.nm)]
        topology.setPeriodicBoxVectors(reducePeriodicBoxVectors(vectors))
    elif atoms.pbc.any():
        raise ValueError(f"pbc is {atoms.pbc.tolist()}; all directions must be periodic, or none")
    return topology, positions * (units.Ang / units.nm)


def topology_of(atoms: "Atoms") -> app.Topology:
    """Topology of a structure of ASE, in one residue and without its box, with bonds by distance.

    The model needs no bonds, but viewers of trajectories and ``hydrogenMass`` do.

    Parameters
    ----------
    atoms : ase.Atoms
        Bonds may cross the faces of its cell where that is periodic. With coordinates that are not finite there are none.

    Returns
    -------
    openmm.app.Topology
        Atoms in the same order.
    """
    from ase.neighborlist import natural_cutoffs, neighbor_list

    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    made = [topology.addAtom(f"{s}{i + 1}", app.Element.getBySymbol(s), residue) for i, s in enumerate(atoms.get_chemical_symbols())]
    if np.isfinite(atoms.positions).all():
        for i, j in zip(*neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.15)), strict=True):
            if i < j:
                topology.addBond(made[i], made[j])
    return topology


def unlikely_molecules(topology: app.Topology, positions: np.ndarray) -> list[str]:
    """Molecules that are, as far as elements and distances tell, no neutral closed shells, the only kind a model is trained on.

    Found are an odd number of electrons (ions and radicals, but not two unpaired electrons or charges that cancel), and carbon chains and
    lone atoms without any hydrogen (crystal structures often lack them). What is found need not be wrong.

    Parameters
    ----------
    topology : openmm.app.Topology
        Elements and box; its bonds are not asked, since many files have none.
    positions : ndarray
        ``(n_atoms, 3)`` nm.

    Returns
    -------
    list of str
        One sentence for each kind of molecule, without a full stop.
    """
    from ase import Atoms, units
    from ase.neighborlist import natural_cutoffs, neighbor_list
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    atoms = Atoms([a.element.symbol if a.element is not None else "X" for a in topology.atoms()], positions=positions * (units.nm / units.Ang))
    box = topology.getPeriodicBoxVectors()
    if box is not None:
        atoms.set_cell(np.array(box.value_in_unit(unit.angstrom)))
        atoms.pbc = True
    first, second = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.15))
    n_molecules, molecule = connected_components(coo_array((np.ones(len(first)), (first, second)), shape=(len(atoms), len(atoms))))
    found: dict[tuple[str, str], list[int]] = {}
    for k in range(n_molecules):
        members = np.flatnonzero(molecule == k)
        elements = atoms[members]
        if "X" in elements.symbols:
            continue
        if "H" not in elements.symbols and (len(members) == 1 or list(elements.symbols).count("C") > 1):
            reason = "has no hydrogens; if they are missing from the file, add them"
        elif elements.numbers.sum() % 2:
            reason = "has an odd number of electrons if it is neutral: an ion, a radical, or hydrogens are missing or doubled"
        else:
            continue
        found.setdefault((elements.get_chemical_formula(), reason), []).append(int(members[0]))
    return [
        f"{formula} (from atom {where[0]} on{f', and {len(where) - 1} more like it' if len(where) > 1 else ''}) {reason}"
        for (formula, reason), where in found.items()
    ]


def check_coordinates(positions: np.ndarray, symbols: list[str], closest_nm: float = 0.03) -> None:
    """Refuse coordinates that no dynamics can start from.

    Parameters
    ----------
    positions : ndarray
        ``(n_atoms, 3)`` nm.
    symbols : list of str
        Chemical symbols, for the message.
    closest_nm : float
        Distance below which two atoms count as coincident.

    Raises
    ------
    UnsupportedSystemError
        Naming the atoms.
    """
    from scipy.spatial import cKDTree

    bad = np.flatnonzero(~np.isfinite(positions).all(1))
    if len(bad):
        raise UnsupportedSystemError(f"atoms {bad[:5].tolist()} have coordinates that are not finite")
    pairs = cKDTree(positions).query_pairs(closest_nm, output_type="ndarray")
    if len(pairs):
        i, j = (int(k) for k in pairs[0])
        distance = float(np.linalg.norm(positions[i] - positions[j]))
        raise UnsupportedSystemError(
            f"atoms {i} ({symbols[i]}) and {j} ({symbols[j]}) are {distance * 10:.3f} Angstrom apart, and {len(pairs)} pairs are closer than "
            f"{closest_nm * 10:.1f}; remove duplicate atoms or alternate locations from the structure"
        )
