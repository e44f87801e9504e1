"""Jacobians, normal modes and thermal displacements of springs, whose answers are in textbooks."""

import numpy as np
import pytest
from scipy import constants

from openmm_se3.physics.harmonic import jacobian, normal_modes, rigid_motions, thermal_displacement
from openmm_se3.physics.units import BOLTZMANN, PER_CM_PER_RAD_PER_PS
from tests.openmm_se3.physics.models import random_matrix

STIFFNESS = 3e5  # kJ/mol/nm^2


def springs(pairs, lengths):
    """Forces of springs between pairs of atoms."""

    def force(x):
        f = np.zeros_like(x)
        for (i, j), length in zip(pairs, lengths, strict=True):
            d = x[j] - x[i]
            r = np.linalg.norm(d)
            f[i] += STIFFNESS * (r - length) * d / r
            f[j] -= STIFFNESS * (r - length) * d / r
        return f

    return force


def test_jacobian_of_a_linear_force_is_its_matrix():
    matrix = random_matrix(9)
    found = jacobian(lambda x: (matrix @ x.reshape(-1)).reshape(-1, 3), np.arange(9.0).reshape(3, 3))
    np.testing.assert_allclose(found, matrix, atol=1e-9)  # and not its transpose


def test_jacobian_is_of_fourth_order():
    """Exact for a quartic polynomial."""
    found = jacobian(lambda x: x**4, np.full((1, 3), 0.7), step_nm=0.1)
    np.testing.assert_allclose(found, 4 * 0.7**3 * np.eye(3), atol=1e-12)


def test_wavenumber_of_an_angular_frequency():
    assert pytest.approx(1e12 / (2 * np.pi * constants.c * 100)) == PER_CM_PER_RAD_PER_PS


def test_diatomic():
    masses = np.array([1.008, 15.999])
    x = np.array([[0.1, 0.2, 0.3], [0.1 + 0.05, 0.2 - 0.06, 0.3 + 0.04]])
    force = springs([(0, 1)], [np.linalg.norm(x[1] - x[0])])
    wavenumbers, modes = normal_modes(-jacobian(force, x), x, masses)
    reduced = masses.prod() / masses.sum()
    np.testing.assert_allclose(wavenumbers, [np.sqrt(STIFFNESS / reduced) * PER_CM_PER_RAD_PER_PS], rtol=1e-6)
    assert modes.shape == (6, 1)


def test_linear_triatomic():
    """Stretches of O=C=O with springs along the bonds: k/m_O, and k (1/m_O + 2/m_C); the bends are free."""
    o, c = 15.999, 12.011
    x = np.array([[-0.116, 0, 0], [0, 0, 0], [0.116, 0, 0]])
    wavenumbers, _ = normal_modes(-jacobian(springs([(0, 1), (1, 2)], [0.116, 0.116]), x), x, np.array([o, c, o]))
    assert len(wavenumbers) == 4
    np.testing.assert_allclose(wavenumbers[:2], 0, atol=2)
    expected = np.sqrt([STIFFNESS / o, STIFFNESS * (1 / o + 2 / c)]) * PER_CM_PER_RAD_PER_PS
    np.testing.assert_allclose(wavenumbers[2:], expected, rtol=1e-6)


def test_rigid_motions_cost_nothing_and_are_as_many_as_there_are():
    bent = np.array([[0.0, 0, 0], [0.1, 0, 0], [0, 0.1, 0]])
    masses = np.array([16.0, 1.0, 1.0])
    assert rigid_motions(bent, masses).shape == (9, 6)
    assert rigid_motions(np.array([[0.0, 0, 0], [0.1, 0.1, 0], [0.3, 0.3, 0]]), masses).shape == (9, 5)
    assert rigid_motions(bent[:1], masses[:1]).shape == (3, 3)
    force = springs([(0, 1), (0, 2), (1, 2)], [0.1, 0.1, 0.1 * np.sqrt(2)])
    root = np.repeat(np.sqrt(masses), 3)
    weighted = -jacobian(force, bent) / np.outer(root, root)
    assert np.abs(weighted @ rigid_motions(bent, masses)).max() < 1e-5 * np.abs(weighted).max()


def test_a_saddle_shows_as_a_negative_wavenumber():
    x = np.array([[0.0, 0, 0], [0.1, 0, 0]])
    wavenumbers, _ = normal_modes(jacobian(springs([(0, 1)], [0.1]), x), x, np.ones(2))
    assert wavenumbers[0] < -100


def test_thermal_displacements_share_the_energy():
    """Each mode holds kT/2 of potential energy on average."""
    masses = np.array([16.0, 1.0, 1.0])
    x = np.array([[0.0, 0, 0], [0.1, 0, 0], [0, 0.1, 0]])
    hessian = -jacobian(springs([(0, 1), (0, 2), (1, 2)], [0.1, 0.1, 0.1 * np.sqrt(2)]), x)
    wavenumbers, modes = normal_modes(hessian, x, masses)
    rng = np.random.default_rng(0)
    shifts = [thermal_displacement(wavenumbers, modes, masses, 300.0, rng).reshape(-1) for _ in range(4000)]
    mean = np.mean([0.5 * s @ hessian @ s for s in shifts])
    assert mean == pytest.approx(1.5 * BOLTZMANN * 300.0, rel=0.05)
