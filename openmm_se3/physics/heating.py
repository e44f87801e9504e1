"""Drift of the energy at constant energy (NVE): what forces that are not a gradient, or too long a step, put into a molecule."""

from dataclasses import dataclass

import numpy as np
import openmm
from openmm import unit

from openmm_se3.binding import MULTIPLE_TIME_STEPS, modes_of
from openmm_se3.integrators import MultipleTimeStepIntegrator
from openmm_se3.masses import masses_of
from openmm_se3.physics.dynamics import Progress, run, time_not_reached, velocities
from openmm_se3.physics.report import Line, Panel, Quantity, Section, thinned
from openmm_se3.physics.settings import PhysicsSettings
from openmm_se3.physics.statistics import mean_of_independent, slope_with_error
from openmm_se3.physics.subject import Minimum, Subject, Surface
from openmm_se3.physics.units import BOLTZMANN
from openmm_se3.potential import SE3Potential
from openmm_se3.replicas import replicate
from openmm_se3.structures import topology_of

#: Samples are so far apart at least, and there are so many at most: each costs an evaluation in double precision for each copy.
SAMPLE_FS = 5.0
MOST_SAMPLES = 1000
#: Share of a run that is left out at its start. A molecule that leaves its minimum moves to the energy surface that the integrator conserves, which
#: is not quite the true one: with multiple time steps the energy rises by some K within 2 to 4 ps and then stays.
START = 0.1
#: Shorter runs say nothing of a drift of hundredths of K/ps.
SHORTEST_JUDGED_PS = 10.0


@dataclass(frozen=True)
class Energies:
    """Total energies of copies of a molecule at constant energy.

    Attributes
    ----------
    time : ndarray
        ``(n,)`` ps.
    total : ndarray
        ``(n, copies)`` kJ/mol, potential and kinetic; the potential is that of the energy head, whatever the forces.
    complete : bool
        False where it ended early, as a `Trace` does, or because an energy was not finite.
    """

    time: np.ndarray
    total: np.ndarray
    complete: bool


def after_start(samples: int) -> slice:
    """What a rate is taken from, of so many samples."""
    return slice(int(START * samples), None)


def rates_of_copies(energies: Energies, degrees_of_freedom: int) -> list[tuple[float, float]]:
    """Slope of every copy's energy and its error, as `heating_rate` has them, K/ps."""
    kept = after_start(len(energies.time))
    total = energies.total[kept] / (degrees_of_freedom * BOLTZMANN)
    return [slope_with_error(energies.time[kept], of_copy) for of_copy in total.T]


def heating_rate(energies: Energies, degrees_of_freedom: int) -> tuple[float, float]:
    """Drift of the total energy as a heating rate, with its standard error.

    The slope of potential plus kinetic energy after the first tenth, divided by the degrees of freedom and Boltzmann's constant: the rate at
    which the temperature rises if the energy spreads evenly over kinetic and potential degrees. The total energy fluctuates far less than the
    temperature does, so a small molecule shows the drift within picoseconds. For direct forces the drift is the work that no energy accounts for.

    Parameters
    ----------
    energies : Energies
        Of one molecule or of several copies.
    degrees_of_freedom : int
        Of the motion of one, 3 n_atoms - 6 for a molecule that neither moves nor rotates.

    Returns
    -------
    tuple of float
        K/ps. Of several copies the mean of their slopes, and the error from their scatter: with multiple time steps the energy of
        each wanders, which its own residuals do not tell. Of one, the error is that of the line through correlated samples.
    """
    slopes = rates_of_copies(energies, degrees_of_freedom)
    if len(slopes) == 1:
        return slopes[0]
    return mean_of_independent([slope for slope, _ in slopes])


def nve_integrator(forces: str, timestep_fs: float, mts_outer: int) -> openmm.Integrator:
    """Velocity Verlet; for multiple time stepping r-RESPA, of the forces of ``SE3Potential(inner_steps=mts_outer)``."""
    inner_steps = mts_outer if forces in MULTIPLE_TIME_STEPS else 1
    return MultipleTimeStepIntegrator(0, 0, inner_steps * timestep_fs * unit.femtosecond, inner_steps, fastInSlow=True)


def run_copies(
    system: openmm.System,
    integrator: openmm.Integrator,
    surface: Surface,
    positions: np.ndarray,
    initial_velocities: np.ndarray,
    picoseconds: float,
    platform: str = "auto",
    progress: Progress | None = None,
) -> Energies:
    """Integrate, and record the energy of every copy.

    Parameters
    ----------
    system : openmm.System
        From `SE3Potential.createSystem`, with ``batch`` where there are several copies.
    integrator : openmm.Integrator
        From `nve_integrator`: with velocities at the time of the positions.
    surface : Surface
        Of one copy.
    positions, initial_velocities : ndarray
        ``(copies, n_atoms, 3)`` nm and nm/ps.
    picoseconds : float
        Length of the run.
    platform : str
        As `SimulationSettings.platform`.
    progress : callable, optional
        Called at each sample.
    """
    sample_fs = max(SAMPLE_FS, picoseconds * 1e3 / MOST_SAMPLES)
    start = positions.reshape(-1, 3), initial_velocities.reshape(-1, 3)
    trace = run(system, integrator, *start, picoseconds, sample_fs, platform, progress)
    x, v = trace.positions.reshape(-1, *positions.shape), trace.velocities.reshape(-1, *positions.shape)
    kinetic = 0.5 * (masses_of(system).reshape(positions.shape[:2]) * np.square(v).sum(3)).sum(2)
    total = kinetic + np.array([[surface.energy(of_copy) for of_copy in sample] for sample in x]).reshape(kinetic.shape)
    finite = np.cumprod(np.isfinite(total).all(1)).astype(bool)
    return Energies(trace.time[finite], total[finite], trace.complete and bool(finite.all()))


def molecule_at_constant_energy(
    subject: Subject,
    at: Minimum,
    forces: str,
    settings: PhysicsSettings,
    hydrogen_mass: float | None = None,
    progress: Progress | None = None,
) -> Energies:
    """`settings.nve_copies` copies of a molecule, from its minimum with kinetic energy for twice the temperature, half of which becomes potential.

    Parameters
    ----------
    subject : Subject
        The model.
    at : Minimum
        The molecule.
    forces : str
        As `SE3Potential`.
    settings : PhysicsSettings
        ``nve_ps``, ``nve_copies``, ``temperature``, ``timestep_fs``, ``mts_outer`` and ``seed`` of it.
    hydrogen_mass : float, optional
        Dalton.
    progress : callable, optional
        Called at each sample.
    """
    topology, positions, batch = replicate(topology_of(at.atoms), at.positions_nm, settings.nve_copies)
    potential = SE3Potential(subject.model, forces=forces, inner_steps=settings.mts_outer)
    system = potential.createSystem(topology, removeCMMotion=False, hydrogenMass=hydrogen_mass, batch=batch if settings.nve_copies > 1 else None)
    masses = masses_of(system)[: len(at.atoms)]
    seeds = range(settings.seed, settings.seed + settings.nve_copies)
    start = np.stack([velocities(at.positions_nm, masses, 2 * settings.temperature, seed, internal=True) for seed in seeds])
    integrator = nve_integrator(forces, settings.timestep_fs, settings.mts_outer)
    positions = positions.reshape(start.shape)
    return run_copies(system, integrator, subject.surface(at.symbols), positions, start, settings.nve_ps, progress=progress)


def measure_heating(subject: Subject, settings: PhysicsSettings, progress: Progress | None = None) -> Section:
    """Heating of each molecule with each kind of forces; of a run that blew up the time that it lacks, too, which only direct forces are forgiven.

    With the fast network, where a model has one, hydrogens are heavier: with their own mass, bonds to them get only four to six kicks in a
    period at an outer step of 2 fs, near enough to a resonance for kicks of that size to heat them.
    """
    quantities: list[Quantity] = []
    panels: list[Panel] = []
    notes: list[str] = []
    # Those that are not recommended with hydrogens of their own mass are not measured so.
    modes = [(forces, settings.hydrogen_mass if forces == "mts-fast" else None) for forces in modes_of(subject.module)]
    runs = [(name, *mode) for name in settings.molecules for mode in modes]
    for k, (name, forces, hydrogen_mass) in enumerate(runs):
        at = subject.minimum(name)
        label = forces if hydrogen_mass is None else f"{forces}, hydrogens of {hydrogen_mass:g} Da"
        share = None if progress is None else (lambda done, k=k: progress((k + done) / len(runs)))
        energies = molecule_at_constant_energy(subject, at, forces, settings, hydrogen_mass, share)
        rate, error = heating_rate(energies, len(at.wavenumbers))
        # Direct forces are reported, not judged, and so is a run that is hardly longer than its start.
        missing = 0.0 if energies.complete else time_not_reached(energies.time, settings.nve_ps)
        judged = forces != "direct" and settings.nve_ps - missing >= SHORTEST_JUDGED_PS
        limits = {"must": 0.05, "aim": 0.005} if judged else {}
        quantities.append(Quantity(f"{name}, {label}", rate, "K/ps", uncertainty=error, **limits))
        if not energies.complete:
            quantities.append(Quantity(f"{name}, {label}: time not reached", missing, "ps", must=None if forces == "direct" else 0.0))
            notes.append(f"{name}, {label}: blew up after {energies.time[-1] if len(energies.time) else 0.0:.2f} ps")
        if name != (panels[-1].title if panels else None):
            panels.append(Panel(name, "time (ps)", "mean change of the total energy\nper degree of freedom (K)", []))
        change = (energies.total - energies.total[:1]).mean(1) / (len(at.wavenumbers) * BOLTZMANN)
        kept = thinned(len(change))
        panels[-1].lines.append(Line(label, energies.time[kept].tolist(), change[kept].tolist()))
    copies = "" if settings.nve_copies == 1 else f", {settings.nve_copies} copies"
    title = f"Heating at constant energy, {settings.timestep_fs:g} fs, {settings.nve_ps:g} ps{copies}"
    return Section("heating", title, quantities, panels, notes)
