"""The integrator for multiple time steps: how often it evaluates each group, its order, reversibility, temperature and limits."""

import pickle

import numpy as np
import openmm
import pytest
from openmm import unit

from openmm_se3 import MultipleTimeStepIntegrator

REFERENCE = "Reference"
FAST, SLOW = "400*r2 + 900*r2^2; r2=(x-0.1)^2+y^2+z^2", "30*r2 + 60*x^3; r2=x^2+y^2+z^2"


def oscillators(n=4, seed=0, part=1.0):
    """Anharmonic oscillators under a stiff and a soft force, positions (nm) and velocities (nm/ps); `part` of the stiff one is in its own group."""
    system, rng = openmm.System(), np.random.default_rng(seed)
    for _ in range(n):
        system.addParticle(12.0)
    for group, energy in ((0, f"{part}*({FAST.replace(';', ');')}"), (1, f"{1 - part}*({FAST.replace(';', ');')}"), (1, SLOW)):
        force = openmm.CustomExternalForce(energy)
        force.setForceGroup(group)
        for i in range(n):
            force.addParticle(i, [])
        system.addForce(force)
    return system, rng.normal(scale=0.1, size=(n, 3)), rng.normal(scale=0.5, size=(n, 3))


def run(integrator, x, v, steps, system=None):
    """Positions, velocities and total energy after some steps."""
    system = oscillators(len(x))[0] if system is None else system
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(REFERENCE))
    context.setPositions(x)
    context.setVelocities(v)
    integrator.step(steps)
    state = context.getState(getPositions=True, getVelocities=True, getEnergy=True)
    energy = (state.getPotentialEnergy() + state.getKineticEnergy()).value_in_unit(unit.kilojoule_per_mole)
    return np.array(state.getPositions(asNumpy=True)._value), np.array(state.getVelocities(asNumpy=True)._value), energy


@pytest.mark.parametrize("inner_steps", [1, 2, 4, 8])
@pytest.mark.parametrize("friction", [0.0, 5.0])
@pytest.mark.parametrize("fast_in_slow", [False, True])
def test_each_group_is_evaluated_as_often_as_it_must_be(inner_steps, friction, fast_in_slow):
    counts = {"fast": 0, "slow": 0}

    def counted(name, stiffness):
        def compute(state):
            counts[name] += 1
            x = state.getPositions(asNumpy=True)._value
            return 0.5 * stiffness * (x**2).sum(), -stiffness * x

        return compute

    system = openmm.System()
    system.addParticle(12.0)
    for group, (name, stiffness) in enumerate((("fast", 1e4), ("slow", 1e2))):
        force = openmm.PythonForce(counted(name, stiffness))
        force.setForceGroup(group)
        system.addForce(force)
    integrator = MultipleTimeStepIntegrator(300, friction, 0.002, inner_steps, fastInSlow=fast_in_slow)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(REFERENCE))
    context.setPositions([[0.1, 0.0, 0.0]])
    integrator.step(1)
    counts.update(fast=0, slow=0)
    for _ in range(3):  # one call of many steps is no different from several calls
        integrator.step(2)
    evaluations = inner_steps - 1 if fast_in_slow and inner_steps > 1 else inner_steps
    assert counts == {"fast": 6 * evaluations, "slow": 6}


@pytest.mark.parametrize("inner_steps", [2, 4, 8])
@pytest.mark.parametrize("friction", [0.0, 5.0])
def test_fast_in_slow_makes_the_same_steps(inner_steps, friction):
    """Where the forces are split for it; at 0 K, since two runs do not draw the same random numbers."""
    ends = []
    for in_slow in (False, True):
        system, x, v = oscillators(part=1 - 1 / inner_steps if in_slow else 1.0)
        ends.append(run(MultipleTimeStepIntegrator(0, friction, 0.02, inner_steps, fastInSlow=in_slow), x, v, 20, system))
    assert np.abs(ends[0][0] - x).max() > 0.05
    for there, here in zip(*ends, strict=True):
        np.testing.assert_allclose(here, there, atol=1e-9)


@pytest.mark.parametrize("fast_in_slow", [False, True])
@pytest.mark.parametrize("inner_steps", [1, 2, 4])
def test_time_is_reversible(inner_steps, fast_in_slow):
    _, x, v = oscillators()
    there = run(MultipleTimeStepIntegrator(0, 0, 0.02, inner_steps, fastInSlow=fast_in_slow), x, v, 50)
    assert np.abs(there[0] - x).max() > 0.05
    back = run(MultipleTimeStepIntegrator(0, 0, 0.02, inner_steps, fastInSlow=fast_in_slow), there[0], -there[1], 50)
    np.testing.assert_allclose(back[0], x, atol=1e-10)
    np.testing.assert_allclose(back[1], -v, atol=1e-9)


@pytest.mark.parametrize(("inner_steps", "fast_in_slow"), [(1, False), (4, False), (4, True)])
def test_second_order_in_the_outer_step(inner_steps, fast_in_slow):
    """Also with `fastInSlow` of forces that are not split for it: then its kicks are less even, but no others in all."""
    _, x, v = oscillators()
    exact = run(MultipleTimeStepIntegrator(0, 0, 0.0001, 1), x, v, 4000)
    ends = [run(MultipleTimeStepIntegrator(0, 0, 0.4 / n, inner_steps, fastInSlow=fast_in_slow), x, v, n)[0] for n in (20, 40)]
    errors = [np.abs(end - exact[0]).max() for end in ends]
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_one_inner_step_is_verlet():
    """OpenMM's leapfrog, started with velocities half a step earlier, visits the same positions."""
    system, x, v = oscillators()
    probe = openmm.Context(system, openmm.VerletIntegrator(0.01), openmm.Platform.getPlatformByName(REFERENCE))
    probe.setPositions(x)
    force = np.array(probe.getState(getForces=True).getForces(asNumpy=True)._value)
    leapfrog = run(openmm.VerletIntegrator(0.01), x, v - 0.5 * 0.01 * force / 12.0, 30)
    np.testing.assert_allclose(run(MultipleTimeStepIntegrator(0, 0, 0.01, 1), x, v, 30)[0], leapfrog[0], atol=1e-12)


def test_conserves_energy_as_well_as_openmms():
    """Deviations of the total energy at the ends of the steps, against r-RESPA with the slow force at both ends."""
    from openmm.mtsintegrator import MTSIntegrator

    deviations = []
    for integrator in (MultipleTimeStepIntegrator(0, 0, 0.03, 4), MTSIntegrator(0.03, [(0, 4), (1, 1)])):
        system, x, v = oscillators()
        start = run(openmm.VerletIntegrator(1e-9), x, v, 1)[2]
        context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(REFERENCE))
        context.setPositions(x)
        context.setVelocities(v)
        energies = []
        for _ in range(100):
            integrator.step(1)
            state = context.getState(getEnergy=True)
            energies.append((state.getPotentialEnergy() + state.getKineticEnergy())._value)
        deviations.append(np.abs(np.array(energies) - start).max())
    assert deviations[0] < 2 * deviations[1]
    assert deviations[0] < 0.02 * start


@pytest.mark.parametrize("inner_steps", [1, 4])
def test_temperature(inner_steps):
    """Equipartition, within four standard errors of the mean, in both degrees of freedom that a harmonic oscillator has."""
    n, stiffness = 200, 4e3
    system = openmm.System()
    for group, share in ((3, 0.9), (4, 0.1)):
        force = openmm.CustomExternalForce(f"{0.5 * stiffness * share}*(x^2+y^2+z^2)")
        force.setForceGroup(group)
        for i in range(n):
            force.addParticle(i, [])
        system.addForce(force)
    for _ in range(n):
        system.addParticle(12.0)
    integrator = MultipleTimeStepIntegrator(300 * unit.kelvin, 20 / unit.picosecond, 4 * unit.femtosecond, inner_steps, forceGroup=3)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(REFERENCE))
    context.setPositions(np.zeros((n, 3)))
    integrator.step(200)
    kinetic, potential = [], []
    for _ in range(40):
        integrator.step(50)  # 0.2 ps: four times the friction's memory
        state = context.getState(getEnergy=True)
        kinetic.append(state.getKineticEnergy()._value)
        potential.append(state.getPotentialEnergy()._value)
    expected = 1.5 * n * 300 * unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin)
    error = np.sqrt(2 / (3 * n * 40))
    assert np.mean(kinetic) / expected == pytest.approx(1, abs=4 * error + 0.003)  # BAOAB's velocities lag by O(step^2)
    assert np.mean(potential) / expected == pytest.approx(1, abs=4 * error)


@pytest.mark.parametrize("inner_steps", [1, 4])
def test_stiff_vibrations_have_the_temperature_of_the_bath(inner_steps):
    """At the end of a step h their velocities have k T (1 - (omega h)^2 / 4), 12% less; what is reported are those of before the last half kick."""
    n, omega, h = 200, 697.0, 1e-3  # 3,700 1/cm in 1/ps, and ps
    system = openmm.System()
    stiff = openmm.CustomExternalForce(f"0.5*{omega**2}*(x^2+y^2+z^2)")
    for i in range(n):
        system.addParticle(1.0)
        stiff.addParticle(i, [])
    system.addForce(stiff)
    integrator = MultipleTimeStepIntegrator(300, 50, inner_steps * h, inner_steps)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(REFERENCE))
    context.setPositions(np.zeros((n, 3)))
    context.setVelocitiesToTemperature(300, 2)
    assert kelvin(context.getState(getEnergy=True).getKineticEnergy()._value, n) == pytest.approx(300, rel=0.15)
    reported, at_end = [], []
    for _ in range(300):
        integrator.step(4)
        state = context.getState(getEnergy=True, getVelocities=True)
        v = state.getVelocities(asNumpy=True)._value
        reported.append(kelvin(state.getKineticEnergy()._value, n))
        assert kelvin(0.5 * np.square(v - integrator.getLastKick()).sum(), n) == pytest.approx(reported[-1], rel=1e-6)
        at_end.append(kelvin(0.5 * np.square(v).sum(), n))
    assert np.mean(reported[30:]) == pytest.approx(300, abs=5)
    assert np.mean(at_end[30:]) == pytest.approx(300 * (1 - (omega * h) ** 2 / 4), abs=5)


def kelvin(kinetic, n):
    """Temperature of a kinetic energy (kJ/mol) of n particles."""
    return 2 * kinetic / (3 * n * unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin))


def test_without_friction_the_kinetic_energy_is_that_of_the_end_of_a_step():
    """Which the total energy needs."""
    system, x, v = oscillators()
    integrator = MultipleTimeStepIntegrator(0, 0, 0.002, 4)
    run(integrator, x, v, 3, system)
    assert not integrator.getLastKick().any()
    assert integrator.getKineticEnergyExpression() == "m*v*v/2"


def test_a_pickled_one_is_the_same():
    """As workers of `multiprocessing` get it."""
    for friction in (0.0, 5.0):
        integrator = pickle.loads(pickle.dumps(MultipleTimeStepIntegrator(300, friction, 0.002, 4)))
        assert integrator.getTemperature().value_in_unit(unit.kelvin) == pytest.approx(300)
        assert integrator.getFriction().value_in_unit(unit.picosecond**-1) == friction
        if friction:
            integrator.setFriction(2)
        else:
            with pytest.raises(ValueError, match="nor positive where the integrator was made without"):
                integrator.setFriction(2)
        system, x, v = oscillators()
        assert np.isfinite(run(integrator, x, v, 3, system)[2])


@pytest.mark.parametrize("frictions", [(1, 0), (0, 1)])
def test_a_state_of_a_run_with_friction_goes_on_without_and_the_other_way_round(frictions):
    """Only an integrator that was made with friction has the steps for it, and tells it."""
    system, x, v = oscillators()
    contexts = [openmm.Context(system, MultipleTimeStepIntegrator(300, f, 0.002, 4), openmm.Platform.getPlatformByName(REFERENCE)) for f in frictions]
    contexts[0].setPositions(x)
    contexts[0].setVelocities(v)
    contexts[0].getIntegrator().step(3)
    saved = contexts[0].getState(positions=True, velocities=True, parameters=True, integratorParameters=True)
    contexts[1].setState(openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(saved)))
    assert contexts[1].getIntegrator().getFriction().value_in_unit(unit.picosecond**-1) == 0
    contexts[1].getIntegrator().step(3)


def test_rigid_constraints_hold():
    system, x, v = oscillators(2)
    system.addConstraint(0, 1, 0.1)
    x[1] = x[0] + [0.1, 0, 0]
    x, v, _ = run(MultipleTimeStepIntegrator(300, 5, 0.01, 4), x, v, 20, system)
    assert np.linalg.norm(x[1] - x[0]) == pytest.approx(0.1, abs=1e-5)
    assert (x[1] - x[0]) @ (v[1] - v[0]) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((300, 1, 0.002, 3), "innerSteps must be 1 or even.*got 3"),
        ((300, 1, 0.002, 0), "innerSteps must be 1 or even.*got 0"),
        ((300, 1, 0.002, 4, 31), "forceGroup must be from 0 to 30.*got 31"),
        ((300, -1 / unit.picosecond, 0.002, 4), "must not be negative, got 300.0 K and -1.0/ps"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultipleTimeStepIntegrator(*arguments)


@pytest.mark.parametrize("when", ["before the Context", "in the Context"])
def test_settings_that_change(when):
    """As an integrator that was made with them."""
    system, x, v = oscillators()
    expected = run(MultipleTimeStepIntegrator(0, 4, 0.006, 6), x, v, 5)
    integrator = MultipleTimeStepIntegrator(300, 1, 0.002, 6)
    context = None if when == "before the Context" else openmm.Context(system, integrator, openmm.Platform.getPlatformByName(REFERENCE))
    integrator.setStepSize(6 * unit.femtosecond)
    integrator.setTemperature(0 * unit.kelvin)
    integrator.setFriction(4 / unit.picosecond)
    if context is None:
        context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(REFERENCE))
    context.setPositions(x)
    context.setVelocities(v)
    integrator.step(5)
    state = context.getState(getPositions=True, getVelocities=True)
    np.testing.assert_allclose(state.getPositions(asNumpy=True)._value, expected[0], atol=1e-12)
    np.testing.assert_allclose(state.getVelocities(asNumpy=True)._value, expected[1], atol=1e-12)
    assert integrator.getStepSize() == 0.006 * unit.picosecond
    assert (integrator.getTemperature(), integrator.getFriction()) == (0 * unit.kelvin, 4 / unit.picosecond)


def test_refused_changes():
    integrator = MultipleTimeStepIntegrator(300, 0, 0.002, 4)
    with pytest.raises(ValueError, match="temperature must not be negative"):
        integrator.setTemperature(-1)
    with pytest.raises(ValueError, match=r"nor positive where the integrator was made without, got 1\.0/ps"):
        integrator.setFriction(1)


@pytest.mark.parametrize("inner_steps", [1, 4])
def test_forces_in_other_groups_are_left_out(inner_steps):
    """Also by what asks the integrator for its groups: minimisers, and barostats."""
    system, x, v = oscillators()
    pull = openmm.CustomExternalForce("1000*(x-1)^2")
    pull.setForceGroup(5)
    for i in range(len(x)):
        pull.addParticle(i, [])
    system.addForce(pull)
    with_pull = run(MultipleTimeStepIntegrator(0, 0, 0.01, inner_steps), x, v, 20, system)
    without = run(MultipleTimeStepIntegrator(0, 0, 0.01, inner_steps), x, v, 20)
    np.testing.assert_allclose(with_pull[0], without[0], atol=1e-12)
    context = openmm.Context(system, MultipleTimeStepIntegrator(0, 0, 0.01, inner_steps), openmm.Platform.getPlatformByName(REFERENCE))
    context.setPositions(x)
    openmm.LocalEnergyMinimizer.minimize(context, 1e-3)
    assert np.abs(context.getState(getPositions=True).getPositions(asNumpy=True)._value[:, 0]).max() < 0.2


def test_a_checkpoint_brings_temperature_and_friction_but_no_step():
    system, x, v = oscillators()
    reference = openmm.Platform.getPlatformByName(REFERENCE)
    saved = openmm.Context(system, MultipleTimeStepIntegrator(0, 4, 0.008, 4), reference)
    saved.setPositions(x)
    saved.setVelocities(v)
    integrator = MultipleTimeStepIntegrator(300, 1, 0.004, 4)
    context = openmm.Context(system, integrator, reference)
    context.loadCheckpoint(saved.createCheckpoint())
    assert (integrator.getTemperature()._value, integrator.getFriction()._value, integrator.getStepSize()._value) == (0, 4, 0.004)
    integrator.step(5)
    expected = run(MultipleTimeStepIntegrator(0, 4, 0.004, 4), x, v, 5)
    state = context.getState(getPositions=True)
    np.testing.assert_allclose(state.getPositions(asNumpy=True)._value, expected[0], atol=1e-12)
    integrator.setTemperature(250)
    assert integrator.getTemperature()._value == pytest.approx(250)
