"""Harmonic analysis: second derivatives by finite differences, vibrational frequencies, thermal displacements.

In the units of OpenMM (nm, kJ/mol, dalton) a square root of force constant over mass is an angular frequency in rad/ps.
"""

from collections.abc import Callable

import numpy as np

from openmm_se3.physics.units import BOLTZMANN, PER_CM_PER_RAD_PER_PS

#: Moves positions ``(n_atoms, 3)`` nm to forces ``(n_atoms, 3)`` kJ/mol/nm.
ForceFunction = Callable[[np.ndarray], np.ndarray]


def jacobian(force: ForceFunction, positions: np.ndarray, step_nm: float = 5e-5) -> np.ndarray:
    """Jacobian of a force by fourth-order central differences.

    Parameters
    ----------
    force : callable
        Positions ``(n_atoms, 3)`` nm to forces ``(n_atoms, 3)`` kJ/mol/nm, in float64.
    positions : ndarray
        ``(n_atoms, 3)`` nm.
    step_nm : float
        Distance between the points of the stencil.

    Returns
    -------
    ndarray
        ``(3 n_atoms, 3 n_atoms)`` kJ/mol/nm^2; element (i, j) is dF_i/dx_j.
    """
    flat = positions.reshape(-1)
    columns = []
    for j in range(len(flat)):
        at = []
        for k in (-2, -1, 1, 2):
            moved = flat.copy()
            moved[j] += k * step_nm
            at.append(force(moved.reshape(-1, 3)).reshape(-1))
        columns.append((at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * step_nm))
    return np.stack(columns, axis=1)


def rigid_motions(positions: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """Orthonormal mass-weighted translations and rotations.

    Parameters
    ----------
    positions : ndarray
        ``(n_atoms, 3)``.
    masses : ndarray
        ``(n_atoms,)``.

    Returns
    -------
    ndarray
        ``(3 n_atoms, k)``; k is 6, 5 for a linear molecule, 3 for an atom.
    """
    x = positions - np.average(positions, axis=0, weights=masses)
    root = np.sqrt(masses)[:, None]
    motions = [(root * axis).reshape(-1) for axis in np.eye(3)] + [(root * np.cross(axis, x)).reshape(-1) for axis in np.eye(3)]
    left, size, _ = np.linalg.svd(np.stack([m / np.linalg.norm(root) for m in motions], axis=1), full_matrices=False)
    # Rotations carry the extent of the molecule; one of them vanishes for a linear molecule.
    return left[:, size > 1e-4 * max(size.max(), 1e-30)]


def normal_modes(hessian: np.ndarray, positions: np.ndarray, masses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Harmonic frequencies and mass-weighted modes, translations and rotations projected out.

    Parameters
    ----------
    hessian : ndarray
        ``(3 n_atoms, 3 n_atoms)`` kJ/mol/nm^2; its symmetric part is used.
    positions : ndarray
        ``(n_atoms, 3)`` nm, a stationary point.
    masses : ndarray
        ``(n_atoms,)`` dalton.

    Returns
    -------
    tuple of ndarray
        Wavenumbers ``(n_modes,)`` 1/cm, ascending, negative where the curvature is, and orthonormal mass-weighted modes
        ``(3 n_atoms, n_modes)``.
    """
    root = np.repeat(np.sqrt(masses), 3)
    weighted = 0.5 * (hessian + hessian.T) / np.outer(root, root)
    rigid = rigid_motions(positions, masses)
    # An orthonormal basis of what is left after the rigid motions.
    internal = np.linalg.svd(rigid, full_matrices=True)[0][:, rigid.shape[1] :]
    curvature, vectors = np.linalg.eigh(internal.T @ weighted @ internal)
    return np.sign(curvature) * np.sqrt(np.abs(curvature)) * PER_CM_PER_RAD_PER_PS, internal @ vectors


def thermal_displacement(
    wavenumbers: np.ndarray, modes: np.ndarray, masses: np.ndarray, temperature: float, rng: np.random.Generator, softest_per_cm: float = 200.0
) -> np.ndarray:
    """A displacement drawn from the classical harmonic ensemble.

    Parameters
    ----------
    wavenumbers, modes, masses : ndarray
        As `normal_modes` takes and gives them.
    temperature : float
        Kelvin.
    rng : numpy.random.Generator
        Source of randomness.
    softest_per_cm : float
        Softer modes, such as torsions, move as if they were this stiff: straight lines describe them only over short ways.

    Returns
    -------
    ndarray
        ``(n_atoms, 3)`` nm.
    """
    omega = np.maximum(np.abs(wavenumbers), softest_per_cm) / PER_CM_PER_RAD_PER_PS
    amplitudes = np.sqrt(BOLTZMANN * temperature) / omega * rng.normal(size=len(omega))
    return (modes @ amplitudes).reshape(-1, 3) / np.sqrt(masses)[:, None]
