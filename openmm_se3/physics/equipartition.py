"""Temperature of each element under a Langevin thermostat: equal in equilibrium, unequal where forces pump heat."""

import numpy as np
import openmm
from ase import Atoms
from openmm import unit

from openmm_se3.binding import MULTIPLE_TIME_STEPS, modes_of
from openmm_se3.integrators import MultipleTimeStepIntegrator
from openmm_se3.physics.dynamics import Progress, Trace, run, time_not_reached, velocities
from openmm_se3.physics.report import Line, Panel, Quantity, Section, thinned
from openmm_se3.physics.settings import PhysicsSettings
from openmm_se3.physics.statistics import mean_with_error
from openmm_se3.physics.subject import Subject
from openmm_se3.physics.units import BOLTZMANN
from openmm_se3.potential import SE3Potential
from openmm_se3.simulation_settings import SimulationSettings
from openmm_se3.structures import topology_of

DISCARD = 0.1  # of the run, in which it comes to the temperature


def element_temperatures(trace: Trace, symbols: list[str], masses: np.ndarray) -> dict[str, np.ndarray]:
    """Kinetic temperature over time of all atoms of each element, and of all atoms under the key ``all``.

    Parameters
    ----------
    trace : Trace
        ``n`` samples.
    symbols : list of str
        ``(n_atoms,)``.
    masses : ndarray
        ``(n_atoms,)`` dalton.

    Returns
    -------
    dict
        ``(n,)`` Kelvin each.
    """
    each = masses * np.square(trace.velocities).sum(2) / (3 * BOLTZMANN)
    chosen = {s: np.array([t == s for t in symbols]) for s in sorted(set(symbols))}
    return {**{s: each[:, mask].mean(1) for s, mask in chosen.items()}, "all": each.mean(1)}


def langevin_integrator(forces: str, settings: PhysicsSettings) -> openmm.Integrator:
    """Langevin integrator with the friction that ``openmm-se3 simulate`` has by default; of multiple time steps where there are two.

    For the forces of ``SE3Potential(inner_steps=settings.mts_outer)``.
    """
    temperature, friction = settings.temperature * unit.kelvin, SimulationSettings.friction_per_ps / unit.picosecond
    step = settings.timestep_fs * unit.femtosecond
    integrator: openmm.Integrator
    if forces in MULTIPLE_TIME_STEPS:
        integrator = MultipleTimeStepIntegrator(temperature, friction, settings.mts_outer * step, settings.mts_outer, fastInSlow=True)
    else:
        integrator = openmm.LangevinMiddleIntegrator(temperature, friction, step)
    integrator.setRandomNumberSeed(settings.seed)
    return integrator


def langevin_trace(
    system: openmm.System, forces: str, atoms: Atoms, positions: np.ndarray, settings: PhysicsSettings, progress: Progress | None = None
) -> Trace:
    """Langevin dynamics from `positions`, its beginning discarded."""
    integrator = langevin_integrator(forces, settings)
    start = velocities(positions, atoms.get_masses(), settings.temperature, settings.seed, internal=False)
    trace = run(system, integrator, positions, start, settings.langevin_ps * (1 + DISCARD), progress=progress)
    kept = trace.time > DISCARD * settings.langevin_ps
    return Trace(trace.time[kept], trace.positions[kept], trace.velocities[kept], trace.complete)


def measure_equipartition(subject: Subject, settings: PhysicsSettings, progress: Progress | None = None) -> Section:
    """Temperature by element of each molecule with each kind of forces that the settings name; of a run that blew up the time that it lacks, too."""
    quantities: list[Quantity] = []
    panels: list[Panel] = []
    notes: list[str] = []
    runs = [(name, forces) for name in settings.molecules for forces in modes_of(subject.module) if forces in settings.langevin_forces]
    for k, (name, forces) in enumerate(runs):
        at = subject.minimum(name)
        potential = SE3Potential(subject.model, forces=forces, inner_steps=settings.mts_outer)
        system = potential.createSystem(topology_of(at.atoms), removeCMMotion=False)
        share = None if progress is None else (lambda done, k=k: progress((k + done) / len(runs)))
        trace = langevin_trace(system, forces, at.atoms, at.positions_nm, settings, share)
        if not trace.complete:
            missing = time_not_reached(trace.time - DISCARD * settings.langevin_ps, settings.langevin_ps)
            quantities.append(Quantity(f"{name}, {forces}: time not reached", missing, "ps", must=0.0))
        if not len(trace.time):
            notes.append(f"{name}, {forces}: blew up at the start")
            continue
        series = element_temperatures(trace, at.symbols, at.atoms.get_masses())
        for element, values in series.items():
            mean, error = mean_with_error(values)
            quantities.append(Quantity(f"{name}, {forces}: {element}", mean, "K", uncertainty=error))
        count = np.arange(1, len(trace.time) + 1)
        kept = thinned(len(count))
        lines = [Line(element, trace.time[kept].tolist(), (np.cumsum(v) / count)[kept].tolist()) for element, v in series.items()]
        panels.append(Panel(f"{name}, {forces}", "time (ps)", "mean temperature so far (K)", lines))
        if not trace.complete:
            notes.append(f"{name}, {forces}: blew up after {trace.time[-1]:.2f} ps")
    title = f"Temperature by element, Langevin {settings.temperature:g} K, {SimulationSettings.friction_per_ps:g}/ps, {settings.langevin_ps:g} ps"
    return Section("equipartition", title, quantities, panels, notes)
