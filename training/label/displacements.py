"""Candidates from random displacements along the modes of an elastic network: no calculation is needed to make them."""

import numpy as np
from ase import Atoms, units
from ase.data import covalent_radii

from training.label.structures import is_plausible

#: Spring of a bond, as those of C-H and C-C single bonds, eV/Angstrom^2.
BOND_SPRING = 30.0
#: Springs fall with (d / r)^6, d the sum of the covalent radii: 1 to 2 eV/Angstrom^2 across an angle, 0.1 to 0.2 across a torsion.
SPRING_POWER = 6
#: Softest mode, eV/Angstrom^2: free rotations and the relative motion of separate molecules stay within a few tenths of an Angstrom.
SOFTEST = 0.1
_TRIES = 20


def elastic_network(atoms: Atoms) -> np.ndarray:
    """Hessian of springs between all pairs, at rest in the given geometry.

    The anisotropic network model with springs that fall as a power of the distance (Yang, Song and Jernigan, PNAS 106, 12347 (2009)),
    made chemical by measuring the distance in covalent radii.

    Returns
    -------
    ndarray
        ``(3 n_atoms, 3 n_atoms)`` eV/Angstrom^2; displacements of the whole and, to first order, rotations cost nothing.
    """
    n = len(atoms)
    difference = atoms.positions[:, None] - atoms.positions[None]
    distance = np.linalg.norm(difference, axis=-1) + np.eye(n)
    radii = covalent_radii[atoms.numbers]
    spring = BOND_SPRING * np.minimum((radii[:, None] + radii[None]) / distance, 1.0) ** SPRING_POWER * (1 - np.eye(n))
    unit = difference / distance[..., None]
    blocks = -np.einsum("ij,ija,ijb->iajb", spring, unit, unit)
    diagonal = -blocks.sum(axis=2)
    for i in range(n):
        blocks[i, :, i, :] = diagonal[i]
    return blocks.reshape(3 * n, 3 * n)


def displaced_frames(atoms: Atoms, temperature: float, n_frames: int, rng: np.random.Generator) -> list[Atoms]:
    """Frames of the Boltzmann distribution of the elastic network: x = x_0 + sum_k sqrt(kT / lambda_k) xi_k v_k, without overall motion.

    Parameters
    ----------
    atoms : ase.Atoms
        Geometry at rest.
    temperature : float
        K.
    n_frames : int
        Frames wanted; fewer come back if most collide.
    rng : numpy.random.Generator
        Of the normal numbers xi.
    """
    if len(atoms) < 2:
        return []
    springs, modes = np.linalg.eigh(elastic_network(atoms))
    internal = springs > 1e-8 * springs[-1]
    amplitudes = np.sqrt(units.kB * temperature / np.maximum(springs[internal], SOFTEST))
    frames: list[Atoms] = []
    for _ in range(_TRIES * n_frames):
        if len(frames) == n_frames:
            break
        shift = modes[:, internal] @ (amplitudes * rng.standard_normal(len(amplitudes)))
        frame = Atoms(atoms.numbers, atoms.positions + shift.reshape(-1, 3))
        if is_plausible(frame):
            frames.append(frame)
    return frames
