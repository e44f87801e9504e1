"""Multiple time steps: two force groups that sum to the conservative model, in every kind of System, and dynamics with them."""

import json
import warnings
from dataclasses import replace

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_se3 import MultipleTimeStepIntegrator, SE3Calculator, SE3Potential
from openmm_se3.force import create_forces
from openmm_se3.model_file import load_model
from openmm_se3.simulate import simulate
from openmm_se3.simulation_files import read_log
from openmm_se3.simulation_settings import SimulationSettings
from tests.openmm_se3.helpers import EXAMPLES, MODEL, energy_and_forces, ethanol, ethanol_in_classical_water, numbers, potential
from tests.openmm_se3.physics.models import Morse, MorseWithFast, MorseWithGradient, write_model

BOX = np.array([[2.0, 0, 0], [0.4, 1.9, 0], [-0.5, 0.6, 1.8]])


MODES = ("conservative", "mts", "mts-fast")


def assert_split(systems, positions, model, z, atoms=slice(None), box=None, platform="Reference", groups=(0, 1), copies=1, tolerance=1e-6, part=1.0):
    """Both groups together are the conservative model; the first has `part` of the direct forces and no energy, or of the fast ones with it."""
    energy, conservative = energy_and_forces(systems["conservative"], positions, platform)
    for mode in (m for m in ("mts", "mts-fast") if m in systems):
        inner_energy, inner = energy_and_forces(systems[mode], positions, platform, {groups[0]})
        outer_energy, outer = energy_and_forces(systems[mode], positions, platform, {groups[1]})
        np.testing.assert_allclose(inner + outer, conservative, atol=tolerance)
        assert min(np.abs(inner).max(), np.abs(outer).max()) > 10
        assert inner_energy + outer_energy == pytest.approx(energy, abs=tolerance)
        expected, forces = (
            (0.0, model(torch.tensor(positions[atoms]), z, box)[1]) if mode == "mts" else model.fast(torch.tensor(positions[atoms]), z, box)
        )
        assert inner_energy / copies == pytest.approx(part * float(expected), abs=tolerance)
        np.testing.assert_allclose(inner[atoms], part * forces.numpy(), atol=tolerance)


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_groups_sum_to_the_conservative_model(platform):
    topology, positions = ethanol()
    systems = {mode: potential(mode).createSystem(topology, forceGroup=3) for mode in MODES}
    assert_split(systems, positions, potential("mts").model, numbers(topology), platform=platform, groups=(3, 4))


@pytest.mark.parametrize("kind", [Morse, MorseWithGradient])
def test_files_with_and_without_their_own_gradient(kind, tmp_path):
    """A file from before `conservative_and_direct` gets its conservative forces by autograd; neither has a fast network."""
    topology, x = ethanol()
    path = write_model(kind(swirl=200.0), tmp_path / "morse.pt")
    systems = {mode: SE3Potential(path, forces=mode, precision="double").createSystem(topology) for mode in ("conservative", "mts")}
    assert_split(systems, x, load_model(path).double(), numbers(topology))
    with pytest.raises(ValueError, match="model 'morse' has no fast network, which forces='mts-fast' needs"):
        SE3Potential(path, forces="mts-fast")
    leaf = torch.tensor(x, requires_grad=True)
    kind().energy(leaf, numbers(topology)).backward()
    np.testing.assert_allclose(energy_and_forces(systems["conservative"], x)[1], -leaf.grad.numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", [Morse, MorseWithGradient, MorseWithFast])
@pytest.mark.parametrize("backend", ["TorchForce", "PythonForce"])
def test_second_force_takes_over_a_part_of_the_first(kind, backend, tmp_path, monkeypatch):
    """With `inner_steps`; and the integrator that fits does the same steps as without."""
    monkeypatch.setattr("openmm_se3.force._choose_backend", lambda: backend)
    topology, x = ethanol()
    path = write_model(kind(swirl=200.0), tmp_path / "morse.pt")
    modes = ("mts", "mts-fast") if kind is MorseWithFast else ("mts",)
    systems, ends = {"conservative": SE3Potential(path, forces="conservative", precision="double").createSystem(topology)}, {}
    for mode in modes:
        for inner_steps in (None, 4):
            se3 = SE3Potential(path, forces=mode, precision="double", inner_steps=inner_steps)
            systems[mode] = se3.createSystem(topology, removeCMMotion=False)
            integrator = MultipleTimeStepIntegrator(0, 0, 2 * unit.femtosecond, 4, fastInSlow=inner_steps is not None)
            context = openmm.Context(systems[mode], integrator, openmm.Platform.getPlatformByName("Reference"))
            context.setPositions(x)
            integrator.step(5)
            ends[inner_steps] = context.getState(getPositions=True).getPositions(asNumpy=True)._value
        np.testing.assert_allclose(ends[4], ends[None], atol=1e-10)
        assert np.abs(ends[4] - x).max() > 1e-4
    assert_split(systems, x, load_model(path).double(), numbers(topology), part=0.75)


def test_other_forces_take_no_notice_of_inner_steps():
    topology, x = ethanol()
    system = SE3Potential(MODEL, forces="direct", precision="double", inner_steps=4).createSystem(topology)
    np.testing.assert_array_equal(energy_and_forces(system, x)[1], energy_and_forces(potential("direct").createSystem(topology), x)[1])


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
    assert_split(systems, x, potential("mts").model, z, atoms, box)
    assert np.abs(energy_and_forces(systems["mts"], x)[1][:9]).max() == 0.0


@pytest.mark.parametrize("interpolate", [False, True])
def test_mixed_system(interpolate):
    topology, classical, x = ethanol_in_classical_water()
    systems = {mode: potential(mode).createMixedSystem(topology, classical, range(9), interpolate=interpolate) for mode in MODES}
    for value in (0.0, 0.25, None) if interpolate else (None,):
        results = []
        for mode in MODES:
            context = openmm.Context(systems[mode], openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
            context.setPositions(x)
            if value is not None:
                context.setParameter("lambda_interpolate", value)
            state = context.getState(getEnergy=True, getForces=True)
            results.append((state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value))
        for energy, forces in results[1:]:
            assert energy == pytest.approx(results[0][0], abs=1e-6)
            np.testing.assert_allclose(forces, results[0][1], atol=1e-6)
    groups = [energy_and_forces(systems["mts"], x, groups={k})[1] for k in (0, 1)]
    assert min(np.abs(g).max() for g in groups) > 10


def test_virtual_sites_are_warned_of():
    topology, classical, _ = ethanol_in_classical_water()
    with pytest.warns(UserWarning, match=r"1 virtual sites \(the first: particle 12\).*run this System on a GPU"):
        potential("mts").createMixedSystem(topology, classical, [0, 3, 4, 5], linkAtomDistances=[(0, 1, 0.109 * unit.nanometer)])
    system = openmm.System()
    for mass in (12.0, 16.0, 1.0, 0.0):
        system.addParticle(mass)
    system.setVirtualSite(3, openmm.TwoParticleAverageSite(0, 1, 0.3, 0.7))
    named = app.Topology()
    residue = named.addResidue("X", named.addChain())
    for symbol in "COH":
        named.addAtom(symbol, app.Element.getBySymbol(symbol), residue)
    named.addAtom("M", None, residue)
    with pytest.warns(UserWarning, match="particle 3"):
        potential("mts-fast").addForces(named, system, [0, 1, 2])
    while system.getNumForces():
        system.removeForce(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        potential("conservative").addForces(named, system, [0, 1, 2])


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
        for mode in ("conservative", "mts-fast"):
            systems[mode] = openmm.System()
            for _ in range(9 * copies):
                systems[mode].addParticle(1.0)
            groups = np.repeat(np.arange(copies), 9).tolist()
            made = create_forces(
                model, model.metadata, z.tolist() * copies, range(9 * copies), 9 * copies, False, mode, 0, backend=backend, groups=groups
            )
            for force in made:
                systems[mode].addForce(force)
        assert_split(systems, np.tile(x, (copies, 1)), model, z, slice(9), copies=copies)


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


def test_simulate_warns_of_long_steps_with_ordinary_hydrogens(tmp_path):
    settings = SimulationSettings(
        structure=str(EXAMPLES / "water.xyz"), model=MODEL, forces="mts-fast", minimize=False, steps=2, report_every=1, platform="Reference"
    )
    with pytest.warns(UserWarning, match=r"mts-fast with steps of 2 fs .* add --hydrogen-mass 3"):
        simulate(settings, tmp_path / "light")
    # Warnings are errors in these tests, so neither of these warns.
    simulate(replace(settings, hydrogen_mass=3.0), tmp_path / "heavy")
    simulate(replace(settings, inner_steps=2), tmp_path / "short")


def test_refusals():
    topology, _ = ethanol()
    with pytest.raises(ValueError, match="forceGroup must be from 0 to 30 with forces='mts', got 31"):
        potential("mts").createSystem(topology, forceGroup=31)
    with pytest.raises(ValueError, match=r"inner_steps must be 1 or even, .* got 3"):
        SE3Potential(MODEL, forces="mts", inner_steps=3)
    mixed_topology, classical, _ = ethanol_in_classical_water()
    with pytest.raises(ValueError, match="inner_steps=4 is for Systems that the model drives alone"):
        SE3Potential(MODEL, forces="mts", inner_steps=4).createMixedSystem(mixed_topology, classical, range(9))
    with pytest.raises(ValueError, match="inner_steps must be positive, got 0"):
        SimulationSettings(structure="x.pdb", inner_steps=0)
    with pytest.raises(ValueError, match="inner_steps must be 1 or even, got 3"):
        SimulationSettings(structure="x.pdb", inner_steps=3)
    with pytest.raises(ValueError, match="multiple-time-step integrators"):
        SE3Calculator(MODEL, forces="mts")
