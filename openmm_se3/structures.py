"""Read structure files into an OpenMM topology and positions."""

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from io import StringIO
from itertools import permutations
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from openmm import Vec3, app, unit
from openmm.app.internal.pdbx.reader.PdbxReader import PdbxReader
from openmm.app.internal.unitcell import reducePeriodicBoxVectors

from openmm_se3 import molfile
from openmm_se3.checks import check_neutral
from openmm_se3.errors import UnsupportedSystemError

if TYPE_CHECKING:
    from ase import Atoms

#: What ASE calls the formats that it reads here; by itself it would go by words in the name too, such as POSCAR.
_FORMATS = {".sdf": "sdf", ".mol": "mol", ".xyz": "extxyz"}
SUFFIXES = (".pdb", ".cif", *_FORMATS)
#: Atoms are bonded up to this times the sum of their covalent radii; two hydrogens up to a length of their own (Angstrom), since theirs is too short.
_BONDED, _BONDED_HYDROGENS = 1.15, 0.85
#: Distance (nm) below which two atoms count as one.
COINCIDENT_NM = 0.03


def read_structure(path: str | Path, box_nm: Sequence[float] | None = None) -> tuple[app.Topology, np.ndarray]:
    """Read PDB, mmCIF, SDF, MOL or (extended) xyz.

    No atom of a PDB file is left out because it is called like another in its residue, as files by ASE or Open Babel have it: such atoms get
    new names. A box of 1 Angstrom, which PDB files of molecules without a crystal hold, counts as none. Atoms without a bond, as in a ligand without
    CONECT records, get those that distances tell, but not an ion, alone in its residue.

    Parameters
    ----------
    path : str or Path
        The file; its suffix tells the format.
    box_nm : sequence of float, optional
        Edges of an orthorhombic periodic box (nm), in place of what the file says; empty for no box.

    Returns
    -------
    tuple
        Topology, with box vectors if the file has them or `box_nm` is given, and positions ``(n_atoms, 3)`` in nm.

    Raises
    ------
    UnsupportedSystemError
        If the file is missing, of another format, unreadable or without atoms, or states a charge or a spin (extended xyz), radicals (SDF and MOL),
        or formal charges that do not sum to zero (PDB, mmCIF, SDF and MOL).

    Warns
    -----
    UserWarning
        If the file holds several structures, of which the first is taken.
    """
    path = Path(path)
    if not path.is_file():
        hint = "" if path.suffix else "; a structure file with coordinates is needed, such as RDKit or Open Babel make of a SMILES"
        raise UnsupportedSystemError(f"{path}: no such file{hint}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UnsupportedSystemError(f"{path}: unknown kind of structure file {suffix!r}; expected one of {', '.join(SUFFIXES)}")
    charge = multiplicity = None
    try:
        if suffix in (".pdb", ".cif"):
            with open(path) as lines:
                if suffix == ".pdb":
                    file = app.PDBFile(StringIO(_with_distinct_names(lines)))
                else:
                    text = lines.read()
                    file = app.PDBxFile(StringIO(_without_unknown_cell(text)))
                    charge = _formal_charge_of_mmcif(text)
            count = file.getNumFrames()
            topology, positions = file.topology, np.array(file.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
            if suffix == ".pdb":
                charge = sum(getattr(atom, "formalCharge", None) or 0 for atom in topology.atoms())  # older OpenMM has none
            box = topology.getPeriodicBoxVectors()
            if box is not None and np.allclose(np.diag(box.value_in_unit(unit.angstrom)), 1.0):
                topology.setPeriodicBoxVectors(None)
        else:
            text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte-order mark
            topology, positions, charge, multiplicity = _read_with_ase(text, suffix, box_nm)
            count = _structures_in(text, suffix)
    except Exception as error:  # the parsers raise whatever they met
        kind = "mmCIF, the only kind of .cif file that is read (make an extended xyz file of another, for example with ASE)"
        kind = kind if suffix == ".cif" else f"{suffix[1:]}, which its name says it is"
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, KeyError) and suffix not in (".pdb", ".cif"):  # ASE's word for what is no element
            reason = f"{error} is no chemical symbol; give symbols instead of atomic numbers, and H for deuterium"
        raise UnsupportedSystemError(f"{path}: cannot be read as {kind} ({reason})") from error
    if topology.getNumAtoms() == 0:
        raise UnsupportedSystemError(f"{path}: holds no atoms")
    if charge is not None or multiplicity is not None:
        try:
            check_neutral(charge, multiplicity)
        except UnsupportedSystemError as error:
            raise UnsupportedSystemError(f"{path}: {error}") from None
    if count > 1:
        warnings.warn(f"{path} holds {count} structures; the first is taken", stacklevel=2)
    if box_nm is not None:
        topology.setPeriodicBoxVectors(np.diag(box_nm) * unit.nanometer if len(box_nm) else None)
    _bond_loose_atoms(topology, positions)
    return topology, positions


def _without_unknown_cell(text: str) -> str:
    """Text of an mmCIF file without a cell whose edges it says are not known, as NMR and predicted structures have it."""
    return re.sub(r"(?m)^_cell\..*\n?", "", text) if re.search(r"(?m)^_cell\.length_[abc]\s+[?.]\s*$", text) else text


def _formal_charge_of_mmcif(text: str) -> int:
    """Sum of ``_atom_site.pdbx_formal_charge`` of the first model, which OpenMM's reader leaves out."""
    blocks: list[Any] = []
    PdbxReader(StringIO(text)).read(blocks)
    sites = blocks[0].getObj("atom_site")
    names = sites.getAttributeList()
    if "pdbx_formal_charge" not in names:
        return 0
    column = names.index("pdbx_formal_charge")
    model = names.index("pdbx_PDB_model_num") if "pdbx_PDB_model_num" in names else None
    rows = [sites.getFullRow(k) for k in range(sites.getRowCount())]
    return sum(int(row[column]) for row in rows if row[column] not in ("?", ".") and (model is None or row[model] == rows[0][model]))


def _structures_in(text: str, suffix: str) -> int:
    """How many structures the text of an xyz, SDF or MOL file holds."""
    if suffix != ".xyz":
        return max(1, len(re.findall(r"(?m)^M  END", text)))
    lines, here, count = text.splitlines(), 0, 0
    while here < len(lines) and lines[here].strip().isdigit():
        here += int(lines[here]) + 2
        count += 1
    return count


def _with_distinct_names(lines: Iterable[str]) -> str:
    """Text of a PDB file in which no two atoms of a residue have the same name and alternate location: OpenMM drops all but the first.

    Names that are unlike all others of their residue stay, since OpenMM finds the bonds of known residues by them.
    """
    out = list(lines)
    residues: list[list[int]] = []
    last = ""
    for k, line in enumerate(out):
        here = line[17:27] if line.startswith(("ATOM", "HETATM")) else line[:6] if line.startswith(("MODEL", "TER")) else last
        if here != last:
            residues.append([])
            last = here
        if line.startswith(("ATOM", "HETATM")):
            residues[-1].append(k)
    for members in residues:
        if len({out[k][12:17] for k in members}) == len(members):
            continue
        if any(out[k][16:17].strip() for k in members):
            raise ValueError(
                f"residue {out[members[0]][17:27].strip()!r} has atoms of the same name, and alternate locations besides; name them apart"
            )
        # The element is in columns 77 and 78, or OpenMM guesses it from the letters that a name begins with, which stay.
        names = [out[k][12:16].strip() for k in members]
        times = Counter(names)
        alike = [k for k, name in zip(members, names, strict=True) if times[name] > 1]
        stems = [out[k][76:78].strip() or out[k][12:16].strip().rstrip("0123456789") for k in alike]
        for k, name in zip(alike, _numbered(stems, {name for name in names if times[name] == 1}), strict=True):
            out[k] = out[k][:12] + (f" {name:3}" if len(name) < 4 else name) + out[k][16:]
    return "".join(out)


def _numbered(stems: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """Names of up to four characters, such as a PDB file holds: each stem and a number, beyond 999 in base 36; none that is taken, none twice."""
    count: dict[str, int] = {}
    names = []
    for stem in stems:
        width = 4 - len(stem)
        while True:
            number = count[stem] = count.get(stem, 0) + 1
            beyond = number - 10**width + 10 * 36 ** (width - 1)  # from A00 on, which no decimal number is
            if beyond >= 36**width:
                raise ValueError(f"{number} atoms of {stem} in one residue are more than have names of their own")
            name = f"{stem}{number}" if number < 10**width else stem + np.base_repr(beyond, 36)
            if name not in taken:
                break
        names.append(name)
    return names


def _bond_loose_atoms(topology: app.Topology, positions: np.ndarray) -> None:
    """Bonds by distance for atoms that have none, such as those of molecules that OpenMM does not know."""
    bonded = {atom.index for bond in topology.bonds() for atom in bond}
    made = list(topology.atoms())
    if len(bonded) == len(made):
        return
    # An ion may be as near to a water as a bond is long, and so may a virtual site, which has no element.
    apart = {a.index for a in made if a.element is None or (len(a.residue) == 1 and a.element.atomic_number != 1)}
    first, second, _ = _bonds_and_molecules(as_ase(topology, positions))
    for i, j in zip(first.tolist(), second.tolist(), strict=True):
        if i < j and not (i in bonded and j in bonded) and not {i, j} & apart:
            topology.addBond(made[i], made[j])


def _read_with_ase(text: str, suffix: str, box_nm: Sequence[float] | None) -> tuple[app.Topology, np.ndarray, Any, Any]:
    """Topology, positions (nm), and the charge and multiplicity that the text of a file states, None where it does not."""
    from ase import units
    from ase.io import read

    if suffix != ".xyz" and "V3000" in text:
        raise ValueError("it is of version V3000; save it as V2000, or as xyz")
    atoms = read(StringIO(text), index=0, format=_FORMATS[suffix])
    if box_nm is not None:  # before bonds are looked for, which may cross the faces
        atoms.pbc = len(box_nm) > 0
        atoms.set_cell(np.array(box_nm) * (units.nm / units.Ang) if len(box_nm) else None)
    topology = topology_of(atoms, molfile.bonds(text) if suffix != ".xyz" else None)
    positions = atoms.positions
    if atoms.pbc.all():
        box, rotation = reduced_cell(atoms)
        positions = positions @ rotation.T
        topology.setPeriodicBoxVectors(box * unit.nanometer)
    elif atoms.pbc.any():
        raise ValueError(f"pbc is {atoms.pbc.tolist()}; all directions must be periodic, or none")
    # A mere word of a comment line is True to ASE.
    stated: dict[str, Any] = {name: value for name, value in atoms.info.items() if isinstance(value, Real) and not isinstance(value, bool)}
    if suffix != ".xyz":
        stated = {"charge": molfile.formal_charge(text), "multiplicity": molfile.multiplicity(text)}
    return topology, positions * (units.Ang / units.nm), stated.get("charge"), stated.get("multiplicity")


def reduced_cell(atoms: "Atoms") -> tuple[np.ndarray, np.ndarray]:
    """Cell in OpenMM's reduced form, and the rotation into its frame.

    The same lattice has many cells. That of the atoms is kept, unless it is left-handed, which OpenMM has no form for, or another leaves more room
    for the cutoff.

    Parameters
    ----------
    atoms : ase.Atoms
        Periodic in all three directions.

    Returns
    -------
    tuple of ndarray
        Box ``(3, 3)`` in nm, rows, lower triangular and reduced; rotation Q ``(3, 3)`` such that ``positions @ Q.T`` are the
        coordinates in the frame of the box.

    Raises
    ------
    UnsupportedSystemError
        If the cell has no volume.
    """
    box, rotation = _reduced(tuple(map(tuple, np.asarray(atoms.cell).tolist())))
    return box.copy(), rotation.copy()


@lru_cache(maxsize=8)  # a calculator asks at every step, mostly for the same
def _reduced(rows_of_cell: tuple[tuple[float, ...], ...]) -> tuple[np.ndarray, np.ndarray]:
    from ase import units
    from ase.cell import Cell
    from ase.geometry import minkowski_reduce

    cell = np.array(rows_of_cell)
    if not abs(np.linalg.det(cell)) > 1e-6:
        raise UnsupportedSystemError(f"the structure is periodic, but its cell {cell.tolist()} has no volume; give it one, or set pbc = False")
    forms = []
    for rows in (cell, *(minkowski_reduce(cell)[0][list(order)] for order in permutations(range(3)))):
        lower, rotation = Cell(rows if np.linalg.det(rows) > 0 else -rows).standard_form()
        vectors = reducePeriodicBoxVectors([Vec3(*row) for row in np.asarray(lower) * (units.Ang / units.nm)])
        forms.append((np.array(vectors.value_in_unit(unit.nanometer)), np.asarray(rotation)))
    room = [np.diag(box).min() for box, _ in forms]
    return forms[0 if room[0] > max(room) - 1e-6 else int(np.argmax(room))]


def _bonds_and_molecules(atoms: "Atoms", bonds: Sequence[tuple[int, int]] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both atoms of each bond, in both orders, and the index of each atom's molecule.

    Bonds by distance, where none are given; none are bonded if a coordinate is not finite.
    """
    from ase.data import atomic_numbers, covalent_radii
    from ase.neighborlist import neighbor_list
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first = second = np.zeros(0, dtype=int)
    if bonds:
        first, second = np.concatenate([bonds, np.fliplr(bonds)]).T
    elif np.isfinite(atoms.positions).all():
        radius = {symbol: covalent_radii[atomic_numbers[symbol]] for symbol in set(atoms.symbols)}
        cutoffs = {(a, b): _BONDED * (radius[a] + radius[b]) for a in radius for b in radius}
        if "H" in radius:
            cutoffs["H", "H"] = _BONDED_HYDROGENS
        first, second = neighbor_list("ij", atoms, cutoffs)
    molecule = connected_components(coo_array((np.ones(len(first)), (first, second)), shape=(len(atoms), len(atoms))))[1]
    return first, second, molecule


def topology_of(atoms: "Atoms", bonds: Sequence[tuple[int, int]] | None = None) -> app.Topology:
    """Topology of a structure of ASE without its box, with bonds and a residue for each molecule that they make.

    The model needs neither, but viewers of trajectories and ``hydrogenMass`` do. Where atoms of different molecules are mixed, there is one residue.

    Parameters
    ----------
    atoms : ase.Atoms
        Bonds may cross the faces of its cell where that is periodic.
    bonds : sequence of tuple of int, optional
        Pairs of atoms; by default, or where there are none, by distance, if all coordinates are finite.

    Returns
    -------
    openmm.app.Topology
        Atoms in the same order.
    """
    first, second, molecule = _bonds_and_molecules(atoms, bonds)
    if (np.diff(molecule) < 0).any():  # they are numbered by their first atoms
        molecule[:] = 0
    topology = app.Topology()
    chain = topology.addChain()
    made: list[app.topology.Atom] = []
    symbols = atoms.get_chemical_symbols()
    for k in range(molecule.max(initial=-1) + 1):
        residue = topology.addResidue("MOL", chain)
        members = [symbols[i] for i in np.flatnonzero(molecule == k)]
        for symbol, name in zip(members, _numbered(members), strict=True):
            made.append(topology.addAtom(name, app.Element.getBySymbol(symbol), residue))
    for i, j in zip(first, second, strict=True):
        if i < j:
            topology.addBond(made[i], made[j])
    return topology


def molecule_of_atoms(topology: app.Topology, positions: np.ndarray) -> np.ndarray:
    """Which atoms are together, by distances: the topology's bonds are not asked, since many files have none.

    Parameters
    ----------
    topology : openmm.app.Topology
        Elements and box.
    positions : ndarray
        ``(n_atoms, 3)`` nm.

    Returns
    -------
    ndarray
        ``(n_atoms,)``: the index of each atom's molecule, from 0.
    """
    return _bonds_and_molecules(as_ase(topology, positions))[2]


def symbols_of(topology: app.Topology) -> list[str]:
    """Elements, H for all isotopes of hydrogen; X for what is none."""
    return [app.Element.getByAtomicNumber(a.element.atomic_number).symbol if a.element is not None else "X" for a in topology.atoms()]


def as_ase(topology: app.Topology, positions: np.ndarray) -> "Atoms":
    """Atoms of ASE, with the cell if the topology has a box.

    Parameters
    ----------
    topology : openmm.app.Topology
        Elements and box.
    positions : ndarray
        ``(n_atoms, 3)`` nm.
    """
    from ase import Atoms, units

    atoms = Atoms(symbols_of(topology), positions=positions * (units.nm / units.Ang))
    box = topology.getPeriodicBoxVectors()
    if box is not None:
        atoms.set_cell(np.array(box.value_in_unit(unit.angstrom)))
        atoms.pbc = True
    return atoms


def unlikely_molecules(topology: app.Topology, positions: np.ndarray) -> list[str]:
    """Molecules that are, as far as elements and distances tell, no neutral closed shells, the only kind a model is trained on.

    Found are an odd number of electrons (ions and radicals, but not two unpaired electrons or charges that cancel), and carbon chains and
    lone atoms without any hydrogen (crystal structures often lack them). What is found need not be wrong.

    Parameters
    ----------
    topology : openmm.app.Topology
        Elements and box.
    positions : ndarray
        ``(n_atoms, 3)`` nm.

    Returns
    -------
    list of str
        One sentence for each kind of molecule, without a full stop.
    """
    atoms = as_ase(topology, positions)
    molecule = _bonds_and_molecules(atoms)[2]
    found: dict[tuple[str, str], list[int]] = {}
    for k in range(molecule.max(initial=-1) + 1):
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


def close_pairs(positions: np.ndarray, box: np.ndarray | None, closest_nm: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of atoms closer than a distance, over periodic images too.

    Parameters
    ----------
    positions : ndarray
        ``(n_atoms, 3)`` nm, finite.
    box : ndarray or None
        ``(3, 3)`` nm, rows.
    closest_nm : float
        The distance.

    Returns
    -------
    tuple of ndarray
        Indices ``(n_pairs, 2)``, the closest pair first, and their distances (nm).
    """
    from ase.neighborlist import primitive_neighbor_list

    # In Angstrom: ASE sorts atoms into cells of at least 3 of whatever unit it is given, and of nanometers one cell would hold them all.
    cell = np.eye(3) if box is None else 10 * box
    first, second, distance = primitive_neighbor_list("ijd", [box is not None] * 3, cell, 10 * positions, 10 * closest_nm)
    kept = np.flatnonzero(first < second)
    kept = kept[np.argsort(distance[kept], kind="stable")]
    return np.stack([first[kept], second[kept]], axis=1), distance[kept] / 10


def check_coordinates(topology: app.Topology, positions: np.ndarray) -> None:
    """Refuse coordinates that no dynamics can start from.

    Parameters
    ----------
    topology : openmm.app.Topology
        Elements, for the message, and box.
    positions : ndarray
        ``(n_atoms, 3)`` nm.

    Raises
    ------
    UnsupportedSystemError
        If they are not finite, or atoms coincide, images in the box among them; it names the atoms.
    """
    bad = np.flatnonzero(~np.isfinite(positions).all(1))
    if len(bad):
        raise UnsupportedSystemError(f"atoms {bad[:5].tolist()} have coordinates that are not finite")
    vectors = topology.getPeriodicBoxVectors()
    pairs, distances = close_pairs(positions, None if vectors is None else np.array(vectors.value_in_unit(unit.nanometer)), COINCIDENT_NM)
    if len(pairs):
        (i, j), symbols = pairs[0].tolist(), symbols_of(topology)
        if vectors is not None and np.linalg.norm(positions[i] - positions[j]) > COINCIDENT_NM:
            raise UnsupportedSystemError(
                f"atoms {i} ({symbols[i]}) and {j} ({symbols[j]}) coincide across the faces of the periodic box, {distances[0] * 10:.3f} Angstrom "
                "apart: the box is smaller than the structure, or the structure holds atoms of the neighbouring one; give the true box, or none"
            )
        raise UnsupportedSystemError(
            f"atoms {i} ({symbols[i]}) and {j} ({symbols[j]}) are {distances[0] * 10:.3f} Angstrom apart, and {len(pairs)} pairs are closer "
            f"than {COINCIDENT_NM * 10:.1f}; remove duplicate atoms or alternate locations from the structure"
        )
