"""Drift of the energy at constant energy (NVE): what forces that are not a gradient, or too long a step, put into a molecule."""

import numpy as np
import openmm
from openmm import unit

from openmm_se3.binding import MULTIPLE_TIME_STEPS, modes_of
from openmm_se3.integrators import MultipleTimeStepIntegrator
from openmm_se3.physics.dynamics import Progress, Trace, run, velocities
from openmm_se3.physics.report import Line, Panel, Quantity, Section, thinned
from openmm_se3.physics.settings import PhysicsSettings
from openmm_se3.physics.statistics import slope_with_error
from openmm_se3.physics.subject import Subject
from openmm_se3.physics.units import BOLTZMANN
from openmm_se3.potential import SE3Potential
from openmm_se3.structures import topology_of

#: A sample costs one evaluation of the model, a tenth of what the steps between two samples cost.
SAMPLE_FS = 5.0


def heating_rate(trace: Trace, degrees_of_freedom: int) -> tuple[float, float]:
    """Drift of the total energy as a heating rate, with its standard error.

    The slope of potential plus kinetic energy, divided by the degrees of freedom and Boltzmann's constant: the rate at which the
    temperature rises if the energy spreads evenly over kinetic and potential degrees. The total energy fluctuates far less than the
    temperature does, so a small molecule shows the drift within picoseconds. For direct forces the potential energy is that of
    the energy head, so the drift is the work that no energy accounts for.

    Parameters
    ----------
    trace : Trace
        Of a run at constant energy.
    degrees_of_freedom : int
        Of the motion, 3 n_atoms - 6 for a molecule that neither moves nor rotates.

    Returns
    -------
    tuple of float
        K/ps.
    """
    slope, error = slope_with_error(trace.time, trace.potential + trace.kinetic)
    return slope / (degrees_of_freedom * BOLTZMANN), error / (degrees_of_freedom * BOLTZMANN)


def nve_integrator(forces: str, timestep_fs: float, mts_outer: int) -> openmm.Integrator:
    """Verlet; for multiple time stepping r-RESPA with the direct force (group 0) inside and the correction (group 1) outside."""
    if forces in MULTIPLE_TIME_STEPS:
        return MultipleTimeStepIntegrator(0, 0, mts_outer * timestep_fs * unit.femtosecond, mts_outer)
    return openmm.VerletIntegrator(timestep_fs * unit.femtosecond)


def measure_heating(subject: Subject, settings: PhysicsSettings, progress: Progress | None = None) -> Section:
    """Heating of each molecule with each kind of forces, from its minimum with kinetic energy for twice the temperature.

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
        system = SE3Potential(subject.model, forces=forces).createSystem(topology_of(at.atoms), removeCMMotion=False, hydrogenMass=hydrogen_mass)
        masses = np.array([system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(system.getNumParticles())])
        # Half of it flows into the potential energy.
        start = velocities(at.positions_nm, masses, 2 * settings.temperature, settings.seed, internal=True)
        integrator = nve_integrator(forces, settings.timestep_fs, settings.mts_outer)
        share = None if progress is None else (lambda done, k=k: progress((k + done) / len(runs)))
        trace = run(system, integrator, at.positions_nm, start, settings.nve_ps, sample_fs=SAMPLE_FS, progress=share)
        rate, error = heating_rate(trace, len(at.wavenumbers))
        # The direct forces alone are reported, not judged.
        limits = {} if forces == "direct" else {"must": 0.05, "aim": 0.005}
        quantities.append(Quantity(f"{name}, {label}", rate, "K/ps", uncertainty=error, **limits))
        if not trace.complete:
            notes.append(f"{name}, {label}: blew up after {trace.time[-1] if len(trace.time) else 0.0:.2f} ps")
        if name != (panels[-1].title if panels else None):
            panels.append(Panel(name, "time (ps)", "change of the total energy\nper degree of freedom (K)", []))
        total = trace.potential + trace.kinetic
        change = (total - total[0]) / (len(at.wavenumbers) * BOLTZMANN) if len(total) else total
        kept = thinned(len(total))
        panels[-1].lines.append(Line(label, trace.time[kept].tolist(), change[kept].tolist()))
    title = f"Heating at constant energy, {settings.timestep_fs:g} fs, {settings.nve_ps:g} ps"
    return Section("heating", title, quantities, panels, notes)
