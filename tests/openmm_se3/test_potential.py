"""The force inside OpenMM: the same numbers on every route, any atoms in any order, boxes, refusals."""

import pickle
import warnings

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_se3 import SE3Potential
from openmm_se3.errors import UnsupportedSystemError
from tests.openmm_se3.helpers import MODEL, energy_and_forces, ethanol, ethanol_in_classical_water, numbers, potential

PLATFORMS = [
    p for p in ("Reference", "CPU", "CUDA") if p in {openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())}
]
LIMIT = {"single": 1e-2, "double": 1e-4}


def torch_forces(positions, z, mode, precision, box=None):
    """Energy and forces straight from the module."""
    model = potential("direct", precision).model
    x = torch.tensor(positions, dtype=torch.float64, requires_grad=True)
    cell = None if box is None else torch.tensor(box, dtype=torch.float64)
    if mode == "direct":
        energy, forces = model(x, z, cell)
    else:
        energy = model.energy(x, z, cell)
        forces = -torch.autograd.grad([energy], [x])[0]
    return float(energy.detach()), forces.detach().numpy()


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("precision", ["single", "double"])
@pytest.mark.parametrize("mode", ["direct", "conservative"])
class TestSameNumbersEverywhere:
    def test_asymmetric_molecule(self, mode, precision, platform):
        topology, positions = ethanol()
        system = potential(mode, precision).createSystem(topology)
        energy, forces = energy_and_forces(system, positions, platform)
        expected_energy, expected = torch_forces(positions, numbers(topology), mode, precision)
        assert np.abs(forces - expected).max() < LIMIT[precision]
        assert energy == pytest.approx(expected_energy, abs=LIMIT[precision])
        assert np.abs(forces).max() > 10  # the comparison is not one of zeros

    def test_shuffled_subset(self, mode, precision, platform):
        """Two molecules, the second described by the model, its atoms named in another order."""
        topology, positions = ethanol()
        both = app.Modeller(topology, positions * unit.nanometer)
        both.add(topology, (positions + np.array([0.9, 0.2, 0.1])) * unit.nanometer)
        z, x = numbers(both.topology), np.array(both.positions.value_in_unit(unit.nanometer))
        atoms = 9 + np.random.default_rng(1).permutation(9)
        system = openmm.System()
        for _ in range(18):
            system.addParticle(1.0)
        potential(mode, precision).addForces(both.topology, system, atoms.tolist())
        energy, forces = energy_and_forces(system, x, platform)
        expected_energy, expected = torch_forces(x[atoms], z[atoms], mode, precision)
        assert np.abs(forces[atoms] - expected).max() < LIMIT[precision]
        assert np.abs(forces[:9]).max() == 0.0
        assert energy == pytest.approx(expected_energy, abs=LIMIT[precision])

    def test_across_a_box_face(self, mode, precision, platform):
        """A molecule cut by the face of a triclinic box, its atoms wrapped apart, feels what it feels in free space."""
        topology, positions = ethanol()
        box = np.array([[2.0, 0, 0], [0.4, 1.9, 0], [-0.5, 0.6, 1.8]])
        topology.setPeriodicBoxVectors(box * unit.nanometer)
        fractional = (positions - positions.mean(0)) @ np.linalg.inv(box)
        wrapped = (fractional - np.floor(fractional)) @ box
        assert np.ptp(wrapped, axis=0).max() > 1.0
        system = potential(mode, precision).createSystem(topology)
        assert system.usesPeriodicBoundaryConditions()
        energy, forces = energy_and_forces(system, wrapped, platform)
        expected_energy, expected = torch_forces(wrapped, numbers(topology), mode, precision, box)
        assert np.abs(forces - expected).max() < LIMIT[precision]
        free_energy, free = torch_forces(positions, numbers(topology), mode, precision)
        assert energy == pytest.approx(expected_energy, abs=LIMIT[precision])
        assert energy == pytest.approx(free_energy, abs=10 * LIMIT[precision])
        if mode == "conservative":  # direct forces lose their net torque only without a box
            assert np.abs(forces - free).max() < 10 * LIMIT[precision]


@pytest.mark.parametrize("mode", ["direct", "conservative"])
def test_calls_1_3_and_30_agree(mode):
    """TorchScript optimises a module during its first calls; the forces must not change with it."""
    topology, positions = ethanol()
    context = openmm.Context(
        potential(mode).createSystem(topology),
        openmm.VerletIntegrator(0.001),
        openmm.Platform.getPlatformByName("Reference"),
    )
    seen = {}
    for call in range(1, 31):
        context.setPositions(positions)
        seen[call] = context.getState(getForces=True).getForces(asNumpy=True)._value.copy()
    assert np.abs(seen[1] - seen[3]).max() < 1e-6
    assert np.abs(seen[1] - seen[30]).max() < 1e-6


def test_conservative_forces_are_the_gradient_of_the_energy():
    topology, positions = ethanol()
    system = potential("conservative").createSystem(topology)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    forces = context.getState(getForces=True).getForces(asNumpy=True)._value
    h = 1e-6
    for atom, axis in ((0, 0), (2, 1), (8, 2)):
        moved = []
        for sign in (1, -1):
            x = positions.copy()
            x[atom, axis] += sign * h
            context.setPositions(x)
            moved.append(context.getState(getEnergy=True).getPotentialEnergy()._value)
        assert -(moved[0] - moved[1]) / (2 * h) == pytest.approx(forces[atom, axis], rel=1e-6, abs=1e-3)


def test_every_image_within_the_cutoff_counts():
    """Two molecules in a box: the energy equals that of a molecule with the nearest image of the other beside it."""
    topology, positions = ethanol()
    both = app.Modeller(topology, positions * unit.nanometer)
    both.add(topology, (positions + np.array([0.0, 0.0, 0.45])) * unit.nanometer)
    z, x = numbers(both.topology), np.array(both.positions.value_in_unit(unit.nanometer))
    free, _ = torch_forces(x, z, "direct", "double")
    box = np.diag([3.0, 3.0, 3.0])
    x[9:] += 2 * box[0] - 1 * box[2]
    periodic, _ = torch_forces(x, z, "direct", "double", box)
    separate, _ = torch_forces(positions, numbers(topology), "direct", "double")
    assert periodic == pytest.approx(free, abs=1e-6)
    assert abs(periodic - 2 * separate) > 0.1  # the neighbour matters


class TestSystems:
    def test_create_system(self):
        topology, _ = ethanol()
        system = potential("direct", "single").createSystem(topology, forceGroup=3)
        masses = [system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(9)]
        assert masses == pytest.approx([a.element.mass.value_in_unit(unit.dalton) for a in topology.atoms()])
        assert system.getNumConstraints() == 0
        assert system.getForce(0).getForceGroup() == 3
        assert sum(isinstance(f, openmm.CMMotionRemover) for f in system.getForces()) == 1
        assert potential("direct", "single").createSystem(topology, removeCMMotion=False).getNumForces() == 1

    def test_through_openmmml(self):
        from openmmml import MLPotential

        from openmm_se3.model_file import find_model
        from openmm_se3.openmmml_plugin import SE3PotentialImplFactory

        topology, positions = ethanol()
        expected = energy_and_forces(potential("direct", "single").createSystem(topology), positions)
        for name, arguments in ((MODEL, {}), ("se3", {"modelPath": str(find_model(MODEL))})):
            assert isinstance(MLPotential._implFactories[name], SE3PotentialImplFactory)  # registered by the entry point
            energy, forces = energy_and_forces(MLPotential(name, **arguments).createSystem(topology), positions)
            assert energy == pytest.approx(expected[0], abs=1e-6)
            np.testing.assert_allclose(forces, expected[1], atol=1e-6)
        with pytest.raises(ValueError, match="needs modelPath"):
            MLPotential("se3")

    def test_openmmml_takes_the_options_of_each_call(self):
        from openmmml import MLPotential

        topology, positions = ethanol()
        ml = MLPotential(MODEL)
        for mode in ("direct", "conservative"):
            expected = energy_and_forces(potential(mode).createSystem(topology), positions)[1]
            np.testing.assert_allclose(
                energy_and_forces(ml.createSystem(topology, forces=mode, precision="double"), positions)[1], expected, atol=1e-6
            )
        given = MLPotential("se3", potential=potential("direct"))
        with pytest.raises(ValueError, match="forces='conservative' was asked for, but the potential that was given has 'direct'"):
            given.createSystem(topology, forces="conservative")
        for wrong in ({"charge": 1}, {"multiplicity": 3}):
            with pytest.raises(UnsupportedSystemError, match="trained on neutral closed shells alone"):
                ml.createSystem(topology, **wrong)
        assert ml.createSystem(topology, charge=0, multiplicity=1).getNumParticles() == 9
        with pytest.raises(ValueError, match="which knows no hydrogenMass; take SE3Potential"):
            ml.createSystem(topology, hydrogenMass=3)
        with pytest.warns(UserWarning, match="force, typo: no option of this potential, and without effect"):
            ml.createSystem(topology, force="conservative", typo=1)

    def test_openmmml_takes_inner_steps(self):
        from openmmml import MLPotential

        topology, positions = ethanol()
        expected = SE3Potential(MODEL, forces="mts", precision="double", inner_steps=4).createSystem(topology)
        made = MLPotential(MODEL).createSystem(topology, forces="mts", precision="double", inner_steps=4)
        for group in (0, 1):
            forces = [energy_and_forces(system, positions, groups={group})[1] for system in (expected, made)]
            np.testing.assert_allclose(*forces, atol=1e-6)

    def test_mixed_system_of_another_topology(self):
        topology, _ = ethanol()
        system = openmm.System()
        for _ in range(18):
            system.addParticle(1.0)
        with pytest.raises(UnsupportedSystemError, match="the topology has 9 atoms, but the System has 18 particles"):
            potential("direct").createMixedSystem(topology, system, range(9))

    def test_a_system_of_the_model_alone_takes_all_atoms(self):
        with pytest.raises(TypeError, match="atoms"):
            potential("direct").createSystem(ethanol()[0], atoms=[0, 1, 2])

    def test_mixed_system_takes_any_iterable(self):
        topology, classical, x = ethanol_in_classical_water()
        se3 = potential("direct", "single")
        expected = energy_and_forces(se3.createMixedSystem(topology, classical, list(range(9))), x)[0]
        assert energy_and_forces(se3.createMixedSystem(topology, classical, (i for i in range(9))), x)[0] == pytest.approx(expected, abs=1e-6)

    def test_another_default_box_is_noticed(self):
        topology, _ = ethanol()
        topology.setUnitCellDimensions(openmm.Vec3(3, 3, 3) * unit.nanometer)
        system, agreeing = openmm.System(), openmm.System()
        for _ in range(9):
            system.addParticle(1.0)
            agreeing.addParticle(1.0)
        with pytest.warns(UserWarning, match=r"diagonal of \[3.0, 3.0, 3.0\] nm, the System's default box, .* \[2.0, 2.0, 2.0\] nm"):
            potential("direct").addForces(topology, system)
        agreeing.setDefaultPeriodicBoxVectors(*topology.getPeriodicBoxVectors())
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            potential("direct").addForces(topology, agreeing)

    def test_atoms_that_have_a_model_already_are_noticed(self):
        topology, classical, _ = ethanol_in_classical_water()
        (force,) = potential("direct").addForces(topology, classical, [8, 0, 1, 2])
        assert force.getName() == "SE3Force(se3-ani1x, direct, atoms 0-2, 8)"
        potential("direct").addForces(topology, classical, range(3, 8))
        with pytest.warns(UserWarning, match=r"a force of a model for atoms \[2, 3\] already"):
            potential("direct").addForces(topology, classical, [9, 2, 3])
        potential("direct").addForces(topology, classical, range(9), scaleParameter="half")

    def test_classical_forces_without_the_box_are_noticed(self):
        topology, classical, _ = ethanol_in_classical_water()
        topology.setUnitCellDimensions([3.0, 3.0, 3.0] * unit.nanometer)
        classical.setDefaultPeriodicBoxVectors(*np.eye(3) * 3.0)
        with pytest.warns(UserWarning, match="the System's own nonbonded forces are not periodic"):
            potential("direct").addForces(topology, classical, range(9))

    def test_mixed_system(self):
        """Ethanol by the model, in water of a classical force field; water far from it keeps its classical forces."""
        topology, classical, x = ethanol_in_classical_water()
        mixed = potential("direct", "single").createMixedSystem(topology, classical, list(range(9)))
        _, mixed_forces = energy_and_forces(mixed, x)
        _, classical_forces = energy_and_forces(classical, x)
        np.testing.assert_allclose(mixed_forces[9:], classical_forces[9:], atol=1e-3)
        ml = energy_and_forces(potential("direct", "single").createSystem(ethanol()[0]), x[:9])[1]
        outside = energy_and_forces(_only_between(classical.getForce(0), x), x)[1]
        np.testing.assert_allclose(mixed_forces[:9], ml + outside[:9], atol=1e-2)


def _only_between(nonbonded, positions):
    """A System with the nonbonded forces between molecule and water alone."""
    system = openmm.System()
    force = openmm.NonbondedForce()
    for i in range(len(positions)):
        system.addParticle(1.0)
        force.addParticle(*nonbonded.getParticleParameters(i))
    for group in (range(9), range(9, len(positions))):
        for i in group:
            for j in group:
                if j < i:
                    force.addException(i, j, 0.0, 0.3, 0.0)
    system.addForce(force)
    return system


def test_deuterium_is_hydrogen_but_for_its_mass():
    topology, x = ethanol()
    energy, forces = energy_and_forces(potential("direct").createSystem(topology), x)
    next(a for a in topology.atoms() if a.element.symbol == "H").element = app.element.deuterium
    system = potential("direct").createSystem(topology)
    heavy = energy_and_forces(system, x)
    assert heavy[0] == energy
    np.testing.assert_array_equal(heavy[1], forces)
    assert sorted({round(system.getParticleMass(i)._value, 2) for i in range(9)}) == [1.01, 2.01, 12.01, 16.0]


def test_pickle_keeps_the_metadata_of_the_model():
    assert pickle.loads(pickle.dumps(potential("direct"))).model.metadata == potential("direct").metadata


class TestRefusals:
    def test_unknown_element_is_named_with_those_known(self):
        topology, _ = ethanol()
        residue = next(topology.residues())
        topology.addAtom("CL1", app.Element.getBySymbol("Cl"), residue)
        with pytest.raises(UnsupportedSystemError, match="not trained on Cl; it knows H, C, N, O"):
            potential("direct", "single").createSystem(topology)

    def test_no_atoms(self):
        with pytest.raises(UnsupportedSystemError, match="no atoms"):
            potential("direct", "single").createSystem(app.Topology())
        topology, _ = ethanol()
        with pytest.raises(UnsupportedSystemError, match="no atoms"):
            SE3Potential(MODEL).addForces(topology, openmm.System(), [])

    def test_missing_element(self):
        topology, _ = ethanol()
        topology.addAtom("M", None, next(topology.residues()))
        with pytest.raises(UnsupportedSystemError, match=r"atoms \[9\] have no element"):
            potential("direct", "single").createSystem(topology)

    @pytest.mark.parametrize(("atoms", "message"), [([0, 99], r"atoms holds \[99\]"), ([0, 0], "more than once"), ([-1], r"\[-1\]")])
    def test_bad_indices(self, atoms, message):
        topology, _ = ethanol()
        with pytest.raises(UnsupportedSystemError, match=message):
            SE3Potential(MODEL).addForces(topology, openmm.System(), atoms)

    def test_extra_particles(self):
        topology, _ = ethanol()
        system = openmm.System()
        for _ in range(10):
            system.addParticle(1.0)
        with pytest.raises(UnsupportedSystemError, match="topology has 9 atoms, but the System has 10 particles"):
            SE3Potential(MODEL).addForces(topology, system)

    def test_small_box(self):
        topology, _ = ethanol()
        topology.setUnitCellDimensions(openmm.Vec3(2.0, 0.9, 2.0) * unit.nanometer)
        with pytest.raises(UnsupportedSystemError, match=r"box is too small: its smallest diagonal element is 0.9 nm.*at least 1 nm"):
            potential("direct", "single").createSystem(topology)

    @pytest.mark.parametrize(("mode", "scale"), [("direct", None), ("direct", "lambda_se3"), ("conservative", None), ("mts", "lambda_se3")])
    def test_box_that_shrinks_later(self, mode, scale):
        topology, positions = ethanol()
        topology.setUnitCellDimensions(openmm.Vec3(2.0, 2.0, 2.0) * unit.nanometer)
        context = openmm.Context(
            potential(mode).createSystem(topology, scaleParameter=scale),
            openmm.VerletIntegrator(0.001),
            openmm.Platform.getPlatformByName("Reference"),
        )
        context.setPositions(positions)
        context.setPeriodicBoxVectors([0.9, 0, 0], [0, 0.9, 0], [0, 0, 0.9])
        with pytest.raises(openmm.OpenMMException, match="box is too small"):
            context.getState(getForces=True)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"forces": "gradient"}, "forces must be one of 'direct', 'conservative', 'mts', 'mts-fast', got 'gradient'"),
            ({"precision": "half"}, "precision must be one of 'single', 'double', got 'half'"),
            ({"device": "abacus"}, "device must be None or a torch device"),
            ({"device": "meta"}, "device must be None, 'cpu' or 'cuda', got 'meta'"),
            ({"max_neighbors": 2.5}, "max_neighbors must be a whole number of at least 1"),
            ({"inner_steps": 2.0}, "inner_steps must be 1 or even"),
        ],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            SE3Potential(MODEL, **arguments)

    def test_coordinates_that_are_not_finite_never_give_a_number(self):
        topology, positions = ethanol()
        positions[3, 1] = np.nan
        system = potential("direct", "single").createSystem(topology)
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
        context.setPositions(positions)
        assert np.isnan(context.getState(getEnergy=True).getPotentialEnergy()._value)
