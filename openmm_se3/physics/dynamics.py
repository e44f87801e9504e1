"""Trajectories for measurements: a molecule, a kind of forces, an integrator; positions and velocities at equal intervals."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import openmm
from openmm import unit

from openmm_se3.integrators import MultipleTimeStepIntegrator
from openmm_se3.masses import masses_of
from openmm_se3.physics.harmonic import rigid_motions
from openmm_se3.physics.units import BOLTZMANN
from openmm_se3.platforms import choose_platform

#: Kelvin, beyond which no molecule is one any more.
HOTTEST = 1e4

#: How OpenMM tells of coordinates, energies and forces that are no longer finite: ``Particle coordinate is NaN``, ``Energy is infinite``.
_NOT_FINITE = re.compile(r"\bNaN\b|\binfinite\b|not finite")

#: Called with the share of the run that is done.
Progress = Callable[[float], None]


def velocities(positions: np.ndarray, masses: np.ndarray, temperature: float, seed: int, internal: bool) -> np.ndarray:
    """Maxwell-Boltzmann velocities.

    Parameters
    ----------
    positions : ndarray
        ``(n_atoms, 3)`` nm.
    masses : ndarray
        ``(n_atoms,)`` dalton.
    temperature : float
        Kelvin.
    seed : int
        Of the draw.
    internal : bool
        Remove the motion and rotation of the whole and scale the rest to exactly `temperature`.

    Returns
    -------
    ndarray
        ``(n_atoms, 3)`` nm/ps.
    """
    v = np.random.default_rng(seed).normal(size=positions.shape) * np.sqrt(BOLTZMANN * temperature / masses)[:, None]
    if not internal:
        return v
    rigid = rigid_motions(positions, masses)
    weighted = (v * np.sqrt(masses)[:, None]).reshape(-1)
    weighted -= rigid @ (rigid.T @ weighted)
    wanted = (positions.size - rigid.shape[1]) * BOLTZMANN * temperature
    norm = float(weighted @ weighted)
    return (weighted * np.sqrt(wanted / norm if norm > 0 else 0.0)).reshape(-1, 3) / np.sqrt(masses)[:, None]


def time_not_reached(time: np.ndarray, picoseconds: float) -> float:
    """What a run that ended early lacks of its length, ps; not 0 where only its last sample shows why it ended."""
    return max(picoseconds - (float(time[-1]) if len(time) else 0.0), 1e-3)


@dataclass(frozen=True)
class Trace:
    """What was recorded of a run.

    Attributes
    ----------
    time : ndarray
        ``(n,)`` ps.
    positions, velocities : ndarray
        ``(n, n_atoms, 3)`` nm and nm/ps; of an integrator of leapfrog type, and of `MultipleTimeStepIntegrator` with friction, velocities of half a
        step before, which have the temperature of the bath.
    complete : bool
        False where it ended early, because coordinates were not finite or the temperature above `HOTTEST`.
    """

    time: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    complete: bool


def run(
    system: openmm.System,
    integrator: openmm.Integrator,
    positions: np.ndarray,
    initial_velocities: np.ndarray,
    picoseconds: float,
    sample_fs: float = 5.0,
    platform: str = "auto",
    progress: Progress | None = None,
) -> Trace:
    """Integrate and record.

    Parameters
    ----------
    system : openmm.System
        From `SE3Potential.createSystem`.
    integrator : openmm.Integrator
        With its step size set.
    positions, initial_velocities : ndarray
        ``(n_atoms, 3)`` nm and nm/ps.
    picoseconds : float
        Length of the run.
    sample_fs : float
        Time between samples, rounded to whole steps.
    platform : str
        As `SimulationSettings.platform`.
    progress : callable, optional
        Called at each sample.

    Returns
    -------
    Trace
        The start is its first sample.

    Raises
    ------
    openmm.OpenMMException
        For any failure but numbers that are not finite, which end the trace.
    """
    step_fs = integrator.getStepSize().value_in_unit(unit.femtosecond)
    every = max(1, round(sample_fs / step_fs))
    samples = max(1, round(picoseconds * 1e3 / (every * step_fs)))
    context = openmm.Context(system, integrator, choose_platform(platform))
    context.setPositions(positions)
    context.setVelocities(initial_velocities)
    masses = masses_of(system)
    rows: list[tuple[float, np.ndarray, np.ndarray]] = []
    complete = True
    for k in range(samples + 1):
        try:
            if k:
                integrator.step(every)
            state = context.getState(positions=True, velocities=True)
        except openmm.OpenMMException as error:
            if not _NOT_FINITE.search(str(error)):
                raise
            complete = False
            break
        x = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        v = state.getVelocities(asNumpy=True).value_in_unit(unit.nanometer / unit.picosecond)
        if isinstance(integrator, MultipleTimeStepIntegrator):
            v = v - integrator.getLastKick()
        if not np.isfinite([x, v]).all():
            complete = False
            break
        rows.append((k * every * step_fs * 1e-3, x, v))
        if masses @ np.square(v).sum(1) > 3 * len(positions) * BOLTZMANN * HOTTEST:
            complete = False
            break
        if progress is not None:
            progress(k / samples)
    shape = (-1, *positions.shape)
    return Trace(
        np.array([t for t, _, _ in rows]),
        np.array([x for _, x, _ in rows]).reshape(shape),
        np.array([v for _, _, v in rows]).reshape(shape),
        complete,
    )
