"""Conservative forces are minus the gradient of the energy: finite differences against autograd, in float64."""

from collections.abc import Callable

import numpy as np

from openmm_se3.physics.report import Quantity, Section
from openmm_se3.physics.settings import PhysicsSettings
from openmm_se3.physics.subject import Subject

#: From where the error of the stencil, which falls with the fourth power of the step, is small, to where that of cancellation, which rises as
#: the step shrinks, still is.
STEPS_NM = (5e-5, 2e-5, 1e-5, 4e-6, 2e-6, 1e-6)


def gradient_error(energy: Callable[[np.ndarray], float], force: Callable[[np.ndarray], np.ndarray], positions: np.ndarray) -> float:
    """Relative difference of forces from minus the gradient of the energy by fourth-order central differences.

    Of several steps, each coordinate takes the two neighbouring ones whose derivatives agree best, and of these the smaller: where the third
    derivative jumps within the stencil, as at the nodes of a spline, only the smallest steps agree, and elsewhere cancellation spoils them.

    Parameters
    ----------
    energy, force : callable
        Positions ``(n_atoms, 3)`` nm to energy, kJ/mol, and forces ``(n_atoms, 3)``, kJ/mol/nm.
    positions : ndarray
        ``(n_atoms, 3)`` nm.

    Returns
    -------
    float
        ``||F + dE/dx|| / ||dE/dx||``; NaN where an energy is not finite.
    """
    gradient = np.zeros(positions.size)
    for j in range(positions.size):
        derivatives = np.zeros(len(STEPS_NM))
        for i, step in enumerate(STEPS_NM):
            for k, weight in ((-2, 1.0), (-1, -8.0), (1, 8.0), (2, -1.0)):
                moved = positions.reshape(-1).copy()
                moved[j] += k * step
                derivatives[i] += weight * energy(moved.reshape(-1, 3)) / (12 * step)
        gradient[j] = derivatives[1:][np.argmin(np.abs(np.diff(derivatives)))] if np.isfinite(derivatives).all() else np.nan
    return float(np.linalg.norm(force(positions).reshape(-1) + gradient) / np.linalg.norm(gradient))


def measure_gradient(subject: Subject, settings: PhysicsSettings) -> Section:
    """Worst `gradient_error` over thermal frames of each molecule."""
    quantities = []
    for name in settings.molecules:
        surface = subject.surface(subject.minimum(name).symbols)
        frames = subject.thermal_frames(name, settings.temperature, settings.frames, settings.seed)
        worst = float(np.max([gradient_error(surface.energy, surface.conservative, x) for x in frames]))
        quantities.append(Quantity(f"{name}: |F + dE/dx| / |dE/dx|", worst, must=1e-6, aim=1e-8))
    return Section("gradient", "F = -dE/dx, float64", quantities)
