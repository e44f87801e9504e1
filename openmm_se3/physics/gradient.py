"""Conservative forces are minus the gradient of the energy: finite differences against autograd, in float64."""

from collections.abc import Callable

import numpy as np

from openmm_se3.physics.report import Quantity, Section
from openmm_se3.physics.settings import PhysicsSettings
from openmm_se3.physics.subject import Subject

#: Balances the error of the stencil, which falls with the fourth power of the step, and that of cancellation, which rises as it shrinks.
STEP_NM = 5e-5


def gradient_error(energy: Callable[[np.ndarray], float], force: Callable[[np.ndarray], np.ndarray], positions: np.ndarray) -> float:
    """Relative difference of forces from minus the gradient of the energy by fourth-order central differences.

    Parameters
    ----------
    energy, force : callable
        Positions ``(n_atoms, 3)`` nm to energy, kJ/mol, and forces ``(n_atoms, 3)``, kJ/mol/nm.
    positions : ndarray
        ``(n_atoms, 3)`` nm.

    Returns
    -------
    float
        ``||F + dE/dx|| / ||dE/dx||``.
    """
    gradient = np.zeros(positions.size)
    for j in range(positions.size):
        weighted = 0.0
        for k, weight in ((-2, 1.0), (-1, -8.0), (1, 8.0), (2, -1.0)):
            moved = positions.reshape(-1).copy()
            moved[j] += k * STEP_NM
            weighted += weight * energy(moved.reshape(-1, 3))
        gradient[j] = weighted / (12 * STEP_NM)
    return float(np.linalg.norm(force(positions).reshape(-1) + gradient) / np.linalg.norm(gradient))


def measure_gradient(subject: Subject, settings: PhysicsSettings) -> Section:
    """Worst `gradient_error` over thermal frames of each molecule."""
    quantities = []
    for name in settings.molecules:
        surface = subject.surface(subject.minimum(name).symbols)
        frames = subject.thermal_frames(name, settings.temperature, settings.frames, settings.seed)
        worst = max(gradient_error(surface.energy, surface.conservative, x) for x in frames)
        quantities.append(Quantity(f"{name}: |F + dE/dx| / |dE/dx|", worst, must=1e-6, aim=1e-8))
    return Section("gradient", "F = -dE/dx, float64", quantities)
