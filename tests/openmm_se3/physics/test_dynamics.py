"""Heating and temperatures of atoms in a swirling trap, where both are known in closed form."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import openmm
import pytest
from ase import Atoms
from openmm import unit
from scipy.linalg import solve_continuous_lyapunov

from openmm_se3 import MultipleTimeStepIntegrator, SE3Potential
from openmm_se3.physics.dynamics import Trace, run, velocities
from openmm_se3.physics.equipartition import element_temperatures, langevin_trace, measure_equipartition
from openmm_se3.physics.heating import Energies, heating_rate, measure_heating, nve_integrator, run_copies
from openmm_se3.physics.report import missed
from openmm_se3.physics.settings import FULL, PhysicsSettings
from openmm_se3.physics.subject import Subject
from openmm_se3.physics.units import BOLTZMANN
from openmm_se3.simulation_settings import SimulationSettings
from openmm_se3.structures import topology_of
from tests.openmm_se3.physics.models import MorseWithFast, MorseWithGradient, Trap, write_model

STIFFNESS, SWIRL = 5e4, 1000.0  # kJ/mol/nm^2


def trapped(tmp_path, symbols, swirl, forces="direct"):
    """Atoms, and their System in a trap."""
    atoms = Atoms(symbols, positions=np.zeros((len(symbols), 3)))
    model = write_model(Trap(STIFFNESS, swirl), tmp_path / "trap.pt")
    return atoms, SE3Potential(model, forces=forces, precision="double").createSystem(topology_of(atoms), removeCMMotion=False)


class Spring:
    """Energy of atoms bound to the origin, as `Surface` gives it."""

    def energy(self, positions):
        return 0.5 * STIFFNESS * float(np.square(positions).sum())


def swirled(tmp_path, copies, forces="direct", picoseconds=0.1):
    """One oxygen in each copy, started on its growing orbit with another radius."""
    atoms, system = trapped(tmp_path, ["O"] * copies, SWIRL, forces)
    growth = np.sqrt(complex(-STIFFNESS, SWIRL) / atoms.get_masses()[0])
    radius = 0.01 * np.arange(1, copies + 1)[:, None, None]
    x, v = radius * np.array([1.0, 0, 0]), radius * np.array([growth.real, growth.imag, 0])
    return run_copies(system, nve_integrator(forces, 0.1, 4), Spring(), x, v, picoseconds, platform="Reference"), growth


def test_heating_of_a_swirl(tmp_path):
    """On the growing orbit w'' = (-k + i c) w / m, the energy of every copy grows by exp(2 Re(lambda) t)."""
    energies, growth = swirled(tmp_path, 3)
    assert growth.real > 0
    assert energies.complete
    assert energies.total.shape == (21, 3)
    exact = energies.total[0] * np.exp(2 * growth.real * energies.time[:, None])
    np.testing.assert_allclose(energies.total, exact, rtol=1e-3)
    expected = [np.polyfit(energies.time[2:], of_copy[2:], 1)[0] / (3 * BOLTZMANN) for of_copy in exact.T]
    rate, error = heating_rate(energies, 3)
    assert rate == pytest.approx(np.mean(expected), rel=1e-2)
    assert error == pytest.approx(np.std(expected, ddof=1) / np.sqrt(3), rel=1e-2)
    rate, error = heating_rate(Energies(energies.time, energies.total[:, :1], True), 3)
    assert rate == pytest.approx(expected[0], rel=1e-2)
    assert error < 0.1 * rate


def test_what_happens_at_the_start_is_no_rate():
    time = np.linspace(0.0, 10.0, 101)
    total = np.tile(np.minimum(time, 1.0)[:, None], 2)
    assert heating_rate(Energies(time, total, True), 3) == (pytest.approx(0.0, abs=1e-12), pytest.approx(0.0, abs=1e-12))


def test_no_heating_without_swirl(tmp_path):
    energies, _ = swirled(tmp_path, 2, forces="conservative", picoseconds=0.2)
    rate, error = heating_rate(energies, 3)
    assert abs(rate) < max(0.05, 2 * error)


def test_samples_are_no_more_than_there_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr("openmm_se3.physics.heating.MOST_SAMPLES", 8)
    energies, _ = swirled(tmp_path, 1)
    np.testing.assert_allclose(energies.time, np.arange(9) * 0.0125, atol=1e-3)
    assert len(energies.time) == 9


def test_blow_up_ends_the_run(tmp_path):
    _, system = trapped(tmp_path, ["H", "H"], 1e6)
    x, v = np.array([[[0.01, 0, 0]], [[0.0, 0, 0]]]), np.array([[[1.0, 1, 1]], [[0.0, 0, 0]]])
    energies = run_copies(system, nve_integrator("direct", 0.5, 4), Spring(), x, v, 1.0, platform="Reference")
    assert not energies.complete
    assert energies.time[-1] < 0.5


@pytest.mark.parametrize("message", ["Particle coordinate is NaN.  For more information, see", "Energy is infinite.", "atoms 1 (H) are not finite"])
def test_numbers_that_are_not_finite_end_the_run(message, monkeypatch):
    trace = one_atom_whose_step_raises(message, monkeypatch)
    assert not trace.complete
    assert len(trace.time) == 1


def test_other_failures_are_no_blow_up(monkeypatch):
    with pytest.raises(openmm.OpenMMException, match="out of memory"):
        one_atom_whose_step_raises("Error creating array: CUDA_ERROR_OUT_OF_MEMORY, out of memory", monkeypatch)


def one_atom_whose_step_raises(message, monkeypatch):
    def step(self, steps):
        raise openmm.OpenMMException(message)

    monkeypatch.setattr(openmm.VerletIntegrator, "step", step)
    system = openmm.System()
    system.addParticle(1.0)
    return run(system, openmm.VerletIntegrator(0.001), np.zeros((1, 3)), np.zeros((1, 3)), 1.0, platform="Reference")


def test_multiple_time_steps_put_the_inner_force_inside():
    """A stiff force is stable only in the inner steps, all but what the second force takes over of it; the soft one acts every outer step."""
    system = openmm.System()
    system.addParticle(1.0)
    for group, stiffness in ((0, 5 / 6 * 1e6), (1, 1 / 6 * 1e6 + 1e3)):
        force = openmm.CustomExternalForce(f"0.5 * {stiffness} * (x^2 + y^2 + z^2)")
        force.addParticle(0)
        force.setForceGroup(group)
        system.addForce(force)
    integrator = nve_integrator("mts", 0.5, 6)
    assert integrator.getStepSize() == 3.0 * unit.femtosecond
    trap = SimpleNamespace(energy=lambda x: 0.5 * 1.001e6 * float(np.square(x).sum()))
    energies = run_copies(system, integrator, trap, np.array([[[0.01, 0, 0]]]), np.zeros((1, 1, 3)), 2.0, platform="Reference")
    assert energies.complete
    assert np.ptp(energies.total) < 0.1 * energies.total[0, 0]
    assert energies.time[1] == pytest.approx(0.006)  # the nearest whole number of outer steps to 5 fs


def test_the_fast_network_is_measured_with_heavier_hydrogens(tmp_path, monkeypatch):
    """Direct forces are not judged, nor are short runs; a model without a fast network is measured without one."""
    subject = Subject(write_model(MorseWithFast(swirl=200.0), tmp_path / "morse.pt"))
    settings = PhysicsSettings(("water",), 1, 0.5, 2, 0.0, (), 10, 0, 0.0, temperature=30.0)
    section = measure_heating(subject, settings)
    found = {q.name: q for q in section.quantities}
    names = ["water, direct", "water, conservative", "water, mts", "water, mts-fast, hydrogens of 3 Da"]
    assert list(found) == names
    assert [q.must for q in section.quantities] == [None] * 4
    monkeypatch.setattr("openmm_se3.physics.heating.SHORTEST_JUDGED_PS", settings.nve_ps)
    assert [q.must for q in measure_heating(subject, settings).quantities] == [None, 0.05, 0.05, 0.05]
    assert [line.label for line in section.panels[0].lines] == [n.removeprefix("water, ") for n in names]
    wander = [np.ptp(line.y) for line in section.panels[0].lines]
    assert 0 < wander[1] < wander[3] < 5.0
    without = measure_heating(Subject(write_model(MorseWithGradient(), tmp_path / "without.pt")), settings)
    assert [q.name for q in without.quantities] == names[:3]


def test_temperatures_of_a_swirl_under_a_thermostat(tmp_path):
    """The stationary covariance of the Langevin equation with a linear force solves a Lyapunov equation, one for each mass."""
    atoms, system = trapped(tmp_path, ["H"] * 100 + ["O"] * 100, SWIRL)
    settings = PhysicsSettings(("water",), 1, 0.0, 1, 3.0, ("direct",), 10, 0, 0.0)
    trace = langevin_trace(system, "direct", atoms, np.zeros((200, 3)), settings)
    found = element_temperatures(trace, atoms.get_chemical_symbols(), atoms.get_masses())
    friction, kt = SimulationSettings.friction_per_ps, BOLTZMANN * settings.temperature
    for element, mass in (("H", 1.008), ("O", 15.999)):
        force = np.array([[-STIFFNESS, -SWIRL], [SWIRL, -STIFFNESS]])
        drift = np.block([[np.zeros((2, 2)), np.eye(2)], [force / mass, -friction * np.eye(2)]])
        noise = np.diag([0, 0, 1, 1]) * 2 * friction * kt / mass
        in_plane = mass * solve_continuous_lyapunov(drift, -noise)[2, 2] / BOLTZMANN
        expected = (2 * in_plane + settings.temperature) / 3
        assert found[element].mean() == pytest.approx(expected, rel=0.04), element
    assert found["H"].mean() > 1.1 * found["O"].mean()
    np.testing.assert_allclose(found["all"], (found["H"] + found["O"]) / 2)


def test_stiff_atoms_have_the_temperature_of_the_bath_with_multiple_time_steps():
    """Whose velocities at the end of a step are 12% too cold in a vibration of 3,700 1/cm with inner steps of 1 fs."""
    n, omega = 100, 697.0  # 1/ps
    system, stiff = openmm.System(), openmm.CustomExternalForce(f"0.5*{omega**2}*(x^2+y^2+z^2)")
    for i in range(n):
        system.addParticle(1.0)
        stiff.addParticle(i, [])
    system.addForce(stiff)
    integrator = MultipleTimeStepIntegrator(300, 50, 4e-3, 4)
    integrator.setRandomNumberSeed(1)
    start = velocities(np.zeros((n, 3)), np.ones(n), 300.0, seed=1, internal=False)
    trace = run(system, integrator, np.zeros((n, 3)), start, 2.0, sample_fs=4.0, platform="Reference")
    assert np.square(trace.velocities[50:]).mean() / BOLTZMANN == pytest.approx(300, rel=0.03)


class TestRunsThatBlowUp:
    """What they did before may look sound, so the time that they lack is a quantity of its own."""

    SETTINGS = replace(FULL, molecules=("water",))

    @pytest.fixture
    def subject(self, tmp_path):
        return Subject(write_model(MorseWithGradient(), tmp_path / "morse.pt"))

    @pytest.mark.parametrize(("reached", "judged"), [(10.0, 0.05), (5.0, None), (0.0, None), (100.0, 0.05)])
    def test_heating(self, subject, monkeypatch, reached, judged):
        time = np.linspace(0.0, reached, 1000) if reached else np.zeros(0)
        blown = Energies(time, np.random.default_rng(0).normal(scale=0.01, size=(len(time), 8)), False)
        monkeypatch.setattr("openmm_se3.physics.heating.molecule_at_constant_energy", lambda *_: blown)
        section = measure_heating(subject, self.SETTINGS)
        found = {q.name: q for q in section.quantities}
        assert [q.name for q in missed([section])] == [f"water, {forces}: time not reached" for forces in ("conservative", "mts")]
        assert found["water, mts: time not reached"].value == pytest.approx(max(100.0 - reached, 1e-3))
        assert found["water, direct: time not reached"].verdict == ""  # they are expected to heat
        assert [found[f"water, {forces}"].must for forces in ("direct", "conservative")] == [None, judged]

    @pytest.mark.parametrize("samples", [0, 100])
    def test_equipartition(self, subject, monkeypatch, samples):
        time = 5.0 + 0.05 * np.arange(1, samples + 1)
        blown = Trace(time, np.zeros((samples, 3, 3)), np.random.default_rng(0).normal(size=(samples, 3, 3)), False)
        monkeypatch.setattr("openmm_se3.physics.equipartition.langevin_trace", lambda *_: blown)
        short = missed([measure_equipartition(subject, self.SETTINGS)])
        assert [q.name for q in short] == [f"water, {forces}: time not reached" for forces in ("direct", "conservative", "mts")]
        assert [q.value for q in short] == pytest.approx([50.0 - 0.05 * samples] * 3)


class TestVelocities:
    X = np.random.default_rng(0).normal(scale=0.1, size=(5, 3))
    M = np.array([1.0, 12.0, 16.0, 14.0, 1.0])

    def test_internal(self):
        v = velocities(self.X, self.M, 300.0, seed=1, internal=True)
        np.testing.assert_allclose(self.M @ v, 0, atol=1e-12)
        np.testing.assert_allclose(np.cross(self.X - self.M @ self.X / self.M.sum(), self.M[:, None] * v).sum(0), 0, atol=1e-12)
        assert (self.M[:, None] * v**2).sum() == pytest.approx((15 - 6) * BOLTZMANN * 300.0)

    def test_thermal(self):
        speeds = np.concatenate([velocities(self.X, self.M, 300.0, seed=s, internal=False) * np.sqrt(self.M)[:, None] for s in range(400)])
        assert np.mean(speeds**2) == pytest.approx(BOLTZMANN * 300.0, rel=0.06)
