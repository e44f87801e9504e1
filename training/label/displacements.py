"""Candidates from random displacements along the modes of a network of springs: no calculation is needed to make them."""

import numpy as np
from ase import Atoms, units
from ase.data import covalent_radii
from scipy.linalg import null_space

from training.label.structures import is_plausible

#: Pairs closer than this times the sum of their covalent radii are bonded.
BONDED = 1.25
#: eV/Angstrom^2 along a bond, as C-H and C-C single bonds have it, and across: what bends of 3 to 6 eV/rad^2 amount to at 1.1 to 1.5 Angstrom.
STRETCH, BEND = 30.0, 3.0
#: Softest mode, eV/Angstrom^2: the distance of molecules beside each other changes by a few tenths of an Angstrom.
SOFTEST = 0.3
_TRIES = 20


def spring_modes(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Modes of a network in which every bond resists being stretched and, more weakly, being turned.

    V = 1/2 sum_bonds [a (d.u)^2 + b (d^2 - (d.u)^2)], d the displacement of one atom relative to the other, u along the bond. The second
    term stands for angles, torsions, and bends out of a plane, in which springs between pairs have no grip on a planar molecule. Torsions
    come out stiff: conformers and dynamics are there for those.

    Parameters
    ----------
    atoms : ase.Atoms
        Geometry at rest.

    Returns
    -------
    tuple of ndarray
        Stiffness ``(n_modes,)`` eV/Angstrom^2, not below `SOFTEST`, and orthonormal modes ``(3 n_atoms, n_modes)``, free of translation and
        rotation of the whole.
    """
    n = len(atoms)
    radii = covalent_radii[atoms.numbers]
    difference = atoms.positions[:, None] - atoms.positions[None]
    distance = np.linalg.norm(difference, axis=-1)
    hessian = np.zeros((n, 3, n, 3))
    for i, j in np.argwhere(np.triu(distance < BONDED * (radii[:, None] + radii[None]), k=1)):
        along = np.outer(difference[i, j], difference[i, j]) / distance[i, j] ** 2
        block = STRETCH * along + BEND * (np.eye(3) - along)
        hessian[i, :, i] += block
        hessian[j, :, j] += block
        hessian[i, :, j] -= block
        hessian[j, :, i] -= block
    centred = atoms.positions - atoms.positions.mean(0)
    axes = np.eye(3)
    whole = [np.tile(axis, n) for axis in axes] + [np.cross(axis, centred).ravel() for axis in axes]
    internal = null_space(np.array(whole), rcond=1e-6)  # (3 n, n_modes); a linear molecule has one rotation less
    stiffness, mixing = np.linalg.eigh(internal.T @ hessian.reshape(3 * n, 3 * n) @ internal)
    return np.maximum(stiffness, SOFTEST), internal @ mixing


def displaced_frames(atoms: Atoms, temperature: float, n_frames: int, rng: np.random.Generator) -> list[Atoms]:
    """Frames of the Boltzmann distribution of the springs: x = x_0 + sum_k sqrt(kT / lambda_k) xi_k v_k.

    Parameters
    ----------
    atoms : ase.Atoms
        Geometry at rest.
    temperature : float
        K.
    n_frames : int
        Frames wanted; fewer come back if most collide, none for a lone atom.
    rng : numpy.random.Generator
        Of the normal numbers xi.
    """
    if len(atoms) < 2:
        return []
    stiffness, modes = spring_modes(atoms)
    amplitudes = np.sqrt(units.kB * temperature / stiffness)
    frames: list[Atoms] = []
    for _ in range(_TRIES * n_frames):
        if len(frames) == n_frames:
            break
        shift = modes @ (amplitudes * rng.standard_normal(len(amplitudes)))
        frame = Atoms(atoms.numbers, atoms.positions + shift.reshape(-1, 3))
        if is_plausible(frame):
            frames.append(frame)
    return frames
