"""What users hand over, refused where it cannot be meant: positions, indices, charges, boxes. Without torch, so that every module may use it."""

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from openmm import unit

from openmm_se3.errors import UnsupportedSystemError

if TYPE_CHECKING:
    from openmm_se3.model_file import ModelMetadata


def in_nanometers(positions: Any, n_atoms: int) -> np.ndarray:
    """Positions as users of OpenMM hold them, as an array of their own.

    Parameters
    ----------
    positions : ndarray, sequence of openmm.Vec3, or openmm.unit.Quantity of either
        ``(n_atoms, 3)``; nm if they have no unit.
    n_atoms : int
        How many there must be.

    Returns
    -------
    ndarray
        ``(n_atoms, 3)`` nm, float64.

    Raises
    ------
    ValueError
        If they have another shape.
    """
    x = positions.value_in_unit(unit.nanometer) if unit.is_quantity(positions) else positions
    x = np.array([row.value_in_unit(unit.nanometer) if unit.is_quantity(row) else row for row in x], dtype=float)
    if x.shape != (n_atoms, 3):
        raise ValueError(f"positions must be ({n_atoms}, 3), three coordinates for each atom of the topology; got {x.shape}")
    return x


def atom_indices(atoms: Iterable[Any], n_atoms: int) -> list[int]:
    """Indices of atoms, and no mask of bools or numbers that are not whole, which would choose other atoms than meant.

    Parameters
    ----------
    atoms : iterable of int
        In any order.
    n_atoms : int
        Atoms of the topology.

    Returns
    -------
    list of int
        In the order given.

    Raises
    ------
    TypeError
        If `atoms` holds what is no index.
    UnsupportedSystemError
        If an index is out of range or repeated.
    """
    indices = [_index(atom) for atom in atoms]
    outside = [i for i in indices if not 0 <= i < n_atoms]
    if outside:
        raise UnsupportedSystemError(f"atoms holds {outside[:5]}, but the topology has atoms 0 to {n_atoms - 1}")
    if len(set(indices)) != len(indices):
        raise UnsupportedSystemError("atoms holds an index more than once; give each atom once")
    return indices


def _index(atom: Any) -> int:
    if isinstance(atom, (bool, np.bool_)):
        raise TypeError("atoms must be indices, got a mask of bools; take numpy.flatnonzero of it")
    try:
        return operator.index(atom)
    except TypeError:
        raise TypeError(f"atoms must be indices, got {atom!r}") from None


def check_neutral(charge: Any, multiplicity: Any) -> None:
    """Refuse a charge or spin that was asked for, since no exported model knows any but a neutral closed shell.

    Parameters
    ----------
    charge, multiplicity : number or None
        In elementary charges, and 2 S + 1; None where nothing was said.

    Raises
    ------
    UnsupportedSystemError
        If the charge is not 0 or the multiplicity not 1.
    """
    for name, value, only in (("charge", charge, 0), ("multiplicity", multiplicity, 1)):
        if value is not None and value != only:
            raise UnsupportedSystemError(f"{name} {value} was asked for, but the model was trained on neutral closed shells alone ({name} {only})")


def check_box(vectors: Any, metadata: "ModelMetadata") -> None:
    """Refuse a periodic box in which the minimum image cannot hold the cutoff.

    Parameters
    ----------
    vectors : ndarray, sequence of openmm.Vec3, or Quantity of either
        Box vectors in reduced form; nm if they have no unit.
    metadata : ModelMetadata
        Tells the cutoff.

    Raises
    ------
    UnsupportedSystemError
        If a diagonal element is below twice the cutoff.
    """
    smallest = np.diag(in_nanometers(vectors, 3)).min()
    if smallest < 2 * metadata.cutoff_nm:
        raise UnsupportedSystemError(
            f"the periodic box is too small: its smallest diagonal element is {smallest:.7g} nm, but model {metadata.name!r} with a cutoff of "
            f"{metadata.cutoff_nm:.4g} nm needs at least {2 * metadata.cutoff_nm:.4g} nm, or an atom would meet two images of another. "
            "Use a larger box or a supercell."
        )
