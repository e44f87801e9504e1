"""Asymmetry of the Jacobian of the direct forces: how far they are from being the gradient of any energy."""

import numpy as np

from openmm_se3.physics.harmonic import jacobian
from openmm_se3.physics.report import Quantity, Section
from openmm_se3.physics.settings import PhysicsSettings
from openmm_se3.physics.subject import NO_DIRECT, Subject


def asymmetry(matrix: np.ndarray) -> float:
    """Size of the antisymmetric part, lambda = ||J - J^T||_F / (2 ||J||_F), which is 0 for the Jacobian of a gradient and 1 for a pure rotation.

    F. Bigi, M. Langer, M. Ceriotti, The dark side of the forces, ICML (2025).

    Parameters
    ----------
    matrix : ndarray
        ``(3 n_atoms, 3 n_atoms)`` Jacobian of the forces.
    """
    return float(np.linalg.norm(matrix - matrix.T) / (2 * np.linalg.norm(matrix)))


def measure_asymmetry(subject: Subject, settings: PhysicsSettings) -> Section:
    """Mean lambda of the direct forces over thermal frames of each molecule, Jacobians by finite differences in float64."""
    title = "Asymmetry of the Jacobian of the direct forces"
    if "direct" in subject.metadata.untrained:
        return Section("asymmetry", title, [], notes=[NO_DIRECT])
    quantities = []
    for name in settings.molecules:
        surface = subject.surface(subject.minimum(name).symbols)
        frames = subject.thermal_frames(name, settings.temperature, settings.frames, settings.seed)
        values = [asymmetry(jacobian(surface.direct, x)) for x in frames]
        error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
        quantities.append(Quantity(f"{name}: lambda", float(np.mean(values)), must=0.03, aim=0.004, uncertainty=error))
    return Section("asymmetry", title, quantities)
