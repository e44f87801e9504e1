"""Multiple time steps: two force groups that sum to the conservative model, in every kind of System, and dynamics with them."""

import json
from dataclasses import replace

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_se3 import MultipleTimeStepIntegrator, SE3Calculator, SE3Potential
from openmm_se3.force import create_forces
from openmm_se3.model_file import load_model
from openmm_se3.simulate import SimulationSettings, read_log, simulate
from tests.openmm_se3.helpers import EXAMPLES, MODEL, energy_and_forces, ethanol, ethanol_in_classical_water, numbers, potential
from tests.openmm_se3.physics.models import Morse, MorseWithFast, MorseWithGradient, write_model

BOX = np.array([[2.0, 0, 0], [0.4, 1.9, 0], [-0.5, 0.6, 1.8]])


MODES = ("conservative", "mts")


def assert_split(systems, positions, platform="Reference", groups=(0, 1), tolerance=1e-6):
    """Both groups together are the conservative model, and neither is nearly all of it. Energy and forces of the first."""
    energy, conservative = energy_and_forces(systems["conservative"], positions, platform)
    inner_energy, inner = energy_and_forces(systems["mts"], positions, platform, {groups[0]})
    outer_energy, outer = energy_and_forces(systems["mts"], positions, platform, {groups[1]})
    np.testing.assert_allclose(inner + outer, conservative, atol=tolerance)
    assert min(np.abs(inner).max(), np.abs(outer).max()) > 10
    assert inner_energy + outer_energy == pytest.approx(energy, abs=tolerance)
    return inner_energy, inner


def assert_fast(split, model, positions, z, atoms=slice(None), box=None, tolerance=1e-6):
    """The first group has the model's fast forces and their energy."""
    energy, forces = model.fast(torch.tensor(positions[atoms]), z, box)
    assert split[0] == pytest.approx(float(energy), abs=tolerance)
    np.testing.assert_allclose(split[1][atoms], forces.numpy(), atol=tolerance)


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_groups_sum_to_the_conservative_model(platform):
    topology, positions = ethanol()
    systems = {mode: potential(mode).createSystem(topology, forceGroup=3) for mode in MODES}
    split = assert_split(systems, positions, platform, groups=(3, 4))
    assert_fast(split, potential("mts")._model, positions, numbers(topology))


@pytest.mark.parametrize("kind", [Morse, MorseWithGradient])
def test_without_a_fast_network_the_inner_forces_are_the_direct_ones(kind, tmp_path):
    """And a file from before `conservative_and_direct` gets its conservative forces by autograd."""
    topology, x = ethanol()
    model = write_model(kind(swirl=200.0), tmp_path / "morse.pt")
    systems = {mode: SE3Potential(model, forces=mode, precision="double").createSystem(topology) for mode in ("direct", *MODES)}
    energy, forces = assert_split(systems, x)
    assert energy == 0.0
    np.testing.assert_allclose(forces, energy_and_forces(systems["direct"], x)[1], atol=1e-6)
    leaf = torch.tensor(x, requires_grad=True)
    kind().energy(leaf, numbers(topology)).backward()
    np.testing.assert_allclose(energy_and_forces(systems["conservative"], x)[1], -leaf.grad.numpy(), atol=1e-4)


def test_subset_in_a_triclinic_box():
    topology, positions = ethanol()
    both = app.Modeller(topology, positions * unit.nanometer)
    both.add(topology, (positions + np.array([0.9, 0.2, 0.1])) * unit.nanometer)
    both.topology.setPeriodicBoxVectors(BOX * unit.nanometer)
    x = np.array(both.positions.value_in_unit(unit.nanometer))
    atoms = (9 + np.random.default_rng(1).permutation(9)).tolist()
    systems = {}
    for mode in MODES:
        systems[mode] = openmm.System()
        systems[mode].setDefaultPeriodicBoxVectors(*BOX)
        for _ in range(18):
            systems[mode].addParticle(1.0)
        potential(mode).addForces(both.topology, systems[mode], atoms)
    z, box = numbers(topology)[np.array(atoms) - 9], torch.tensor(BOX)
    assert_fast(assert_split(systems, x), potential("mts")._model, x, z, atoms, box)
    assert np.abs(energy_and_forces(systems["mts"], x)[1][:9]).max() == 0.0


@pytest.mark.parametrize("interpolate", [False, True])
def test_mixed_system(interpolate):
    topology, classical, x = ethanol_in_classical_water()
    systems = {mode: potential(mode).createMixedSystem(topology, classical, range(9), interpolate=interpolate) for mode in MODES}
    assert_split(systems, x)
    if interpolate:
        for value in (0.0, 0.25):
            results = []
            for mode in ("conservative", "mts"):
                context = openmm.Context(systems[mode], openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
                context.setPositions(x)
                context.setParameter("lambda_interpolate", value)
                state = context.getState(getEnergy=True, getForces=True)
                results.append((state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value))
            assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
            np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-6)


def test_through_openmmml():
    from openmmml import MLPotential

    system = MLPotential("se3", potential=potential("mts")).createSystem(ethanol()[0])
    assert [f.getForceGroup() for f in system.getForces()][:2] == [0, 1]


@pytest.mark.parametrize("backend", ["TorchForce", "PythonForce"])
def test_fast_forces_of_a_file_that_has_them(backend, tmp_path):
    """Through both kinds of force, and through one that keeps molecules apart."""
    topology, x = ethanol()
    model = load_model(write_model(MorseWithFast(swirl=200.0), tmp_path / "morse.pt")).double()
    z = numbers(topology)
    for copies in (1, 2):
        systems = {}
        for mode in MODES:
            systems[mode] = openmm.System()
            for _ in range(9 * copies):
                systems[mode].addParticle(1.0)
            groups = np.repeat(np.arange(copies), 9).tolist()
            made = create_forces(
                model, model.metadata, z.tolist() * copies, range(9 * copies), 9 * copies, False, mode, 0, backend=backend, groups=groups
            )
            for force in made:
                systems[mode].addForce(force)
        energy, forces = assert_split(systems, np.tile(x, (copies, 1)))
        assert_fast((energy / copies, forces), model, x, z, slice(9))
        np.testing.assert_allclose(forces[-9:], forces[:9], atol=1e-6)


def test_energy_is_conserved():
    """Over 50 fs in steps of 2 fs the total energy stays, while much energy passes between potential and kinetic."""
    topology, positions = ethanol()
    integrator = MultipleTimeStepIntegrator(0, 0, 2 * unit.femtosecond, 4)
    context = openmm.Context(
        potential("mts", "single").createSystem(topology, removeCMMotion=False), integrator, openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(positions)
    potentials, totals = [], []
    for _ in range(5):
        integrator.step(5)
        state = context.getState(getEnergy=True)
        potentials.append(state.getPotentialEnergy()._value)
        totals.append(potentials[-1] + state.getKineticEnergy()._value)
    assert np.ptp(totals) < 0.5
    assert np.ptp(potentials) > 5 * np.ptp(totals)


def test_simulate_and_resume(tmp_path):
    settings = SimulationSettings(
        structure=str(EXAMPLES / "water.xyz"), model=MODEL, forces="mts", inner_steps=4, minimize=False, steps=8, report_every=2, platform="Reference"
    )
    simulate(settings, tmp_path / "whole")
    np.testing.assert_allclose(read_log(tmp_path / "whole" / "log.csv")["time_ps"], 0.002 * np.array([2, 4, 6, 8]), rtol=1e-6)
    simulate(replace(settings, steps=4), tmp_path / "parts")
    kept = tmp_path / "parts" / "settings.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "steps": 8}))
    simulate(None, tmp_path / "parts", resume=True)
    whole, parts = (read_log(tmp_path / name / "log.csv") for name in ("whole", "parts"))
    for column in whole:  # TorchScript rounds the first calls of a process otherwise than later ones
        np.testing.assert_allclose(parts[column], whole[column], rtol=1e-5)


def test_refusals():
    topology, _ = ethanol()
    with pytest.raises(ValueError, match="forceGroup must be from 0 to 30 with forces='mts', got 31"):
        potential("mts").createSystem(topology, forceGroup=31)
    with pytest.raises(ValueError, match="inner_steps must be positive, got 0"):
        SimulationSettings(structure="x.pdb", inner_steps=0)
    with pytest.raises(ValueError, match="inner_steps must be 1 or even, got 3"):
        SimulationSettings(structure="x.pdb", inner_steps=3)
    with pytest.raises(ValueError, match="multiple-time-step integrators"):
        SE3Calculator(MODEL, forces="mts")
