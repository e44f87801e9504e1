"""Drift of the energy at constant energy (NVE): what forces that are not a gradient, or too long a step, put into a molecule."""

import openmm
from openmm import unit

from openmm_se3.integrators import MultipleTimeStepIntegrator
from openmm_se3.physics.dynamics import Progress, Trace, run, velocities
from openmm_se3.physics.molecules import topology_of
from openmm_se3.physics.report import Line, Panel, Quantity, Section, thinned
from openmm_se3.physics.settings import PhysicsSettings
from openmm_se3.physics.statistics import slope_with_error
from openmm_se3.physics.subject import Subject
from openmm_se3.physics.units import BOLTZMANN
from openmm_se3.potential import FORCE_MODES, SE3Potential

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
    if forces == "mts":
        return MultipleTimeStepIntegrator(0, 0, mts_outer * timestep_fs * unit.femtosecond, mts_outer)
    return openmm.VerletIntegrator(timestep_fs * unit.femtosecond)


def measure_heating(subject: Subject, settings: PhysicsSettings, progress: Progress | None = None) -> Section:
    """Heating of each molecule with each kind of forces, from its minimum with kinetic energy for twice the temperature."""
    quantities: list[Quantity] = []
    panels: list[Panel] = []
    notes: list[str] = []
    runs = [(name, forces) for name in settings.molecules for forces in FORCE_MODES]
    for k, (name, forces) in enumerate(runs):
        at = subject.minimum(name)
        masses = at.atoms.get_masses()
        system = SE3Potential(subject.model, forces=forces).createSystem(topology_of(at.atoms), removeCMMotion=False)
        # Half of it flows into the potential energy.
        start = velocities(at.positions_nm, masses, 2 * settings.temperature, settings.seed, internal=True)
        integrator = nve_integrator(forces, settings.timestep_fs, settings.mts_outer)
        share = None if progress is None else (lambda done, k=k: progress((k + done) / len(runs)))
        trace = run(system, integrator, at.positions_nm, start, settings.nve_ps, sample_fs=SAMPLE_FS, progress=share)
        rate, error = heating_rate(trace, len(at.wavenumbers))
        # The direct forces alone are reported, not judged.
        limits = {} if forces == "direct" else {"must": 0.05, "aim": 0.005}
        quantities.append(Quantity(f"{name}, {forces}", rate, "K/ps", uncertainty=error, **limits))
        if not trace.complete:
            notes.append(f"{name}, {forces}: blew up after {trace.time[-1] if len(trace.time) else 0.0:.2f} ps")
        if name != (panels[-1].title if panels else None):
            panels.append(Panel(name, "time (ps)", "change of the total energy\nper degree of freedom (K)", []))
        total = trace.potential + trace.kinetic
        change = (total - total[0]) / (len(at.wavenumbers) * BOLTZMANN) if len(total) else total
        kept = thinned(len(total))
        panels[-1].lines.append(Line(forces, trace.time[kept].tolist(), change[kept].tolist()))
    title = f"Heating at constant energy, {settings.timestep_fs:g} fs, {settings.nve_ps:g} ps"
    return Section("heating", title, quantities, panels, notes)
