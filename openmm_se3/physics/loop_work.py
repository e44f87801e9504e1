"""Work of the direct forces around closed loops, which is zero for forces that conserve energy."""

import numpy as np

from openmm_se3.physics.harmonic import ForceFunction
from openmm_se3.physics.report import Quantity, Section
from openmm_se3.physics.settings import PhysicsSettings
from openmm_se3.physics.subject import NO_DIRECT, Subject

POINTS = 32


def loop_work(force: ForceFunction, center: np.ndarray, u: np.ndarray, v: np.ndarray, points: int = POINTS) -> tuple[float, float, float]:
    """Work around the ellipse ``center + u cos(t) + v sin(t)``.

    The trapezoidal rule on a closed, smooth path converges faster than any power of the number of points.

    Parameters
    ----------
    force : callable
        Positions ``(n_atoms, 3)`` nm to forces ``(n_atoms, 3)`` kJ/mol/nm.
    center, u, v : ndarray
        ``(n_atoms, 3)`` nm.
    points : int
        Evaluations of the force.

    Returns
    -------
    tuple of float
        Work, kJ/mol; length of the loop, nm, in the space of all coordinates; integral of the force along the loop without its
        sign, kJ/mol, to compare the work with.
    """
    work = length = traffic = 0.0
    for t in 2 * np.pi * np.arange(points) / points:
        tangent = (v * np.cos(t) - u * np.sin(t)) * (2 * np.pi / points)
        along = float(np.sum(force(center + u * np.cos(t) + v * np.sin(t)) * tangent))
        work += along
        traffic += abs(along)
        length += float(np.linalg.norm(tangent))
    return work, length, traffic


def measure_loop_work(subject: Subject, settings: PhysicsSettings) -> Section:
    """Loops about each molecule's minimum that pass through thermal displacements."""
    title = "Work of the direct forces around closed loops"
    if "direct" in subject.metadata.untrained:
        return Section("loop-work", title, [], notes=[NO_DIRECT])
    quantities = []
    for name in settings.molecules:
        at = subject.minimum(name)
        surface = subject.surface(at.symbols)
        shifts = [x - at.positions_nm for x in subject.thermal_frames(name, settings.temperature, 2 * settings.frames, settings.seed)]
        loops = [loop_work(surface.direct, at.positions_nm, u, v) for u, v in zip(shifts[::2], shifts[1::2], strict=True)]
        per_length = [abs(work) / length for work, length, _ in loops]
        error = float(np.std(per_length, ddof=1) / np.sqrt(len(loops))) if len(loops) > 1 else 0.0
        share = sum(abs(work) for work, _, _ in loops) / sum(traffic for _, _, traffic in loops)
        quantities += [
            Quantity(f"{name}: |work| per length", float(np.mean(per_length)), "kJ/mol/nm", uncertainty=error),
            Quantity(f"{name}: |work| over the integral of |F dx|", share),
        ]
    return Section("loop-work", title, quantities)
