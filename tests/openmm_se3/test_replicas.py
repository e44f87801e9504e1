"""Molecules that do not see each other in one force: the same numbers as in forces of their own."""

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_se3 import replicate
from openmm_se3.errors import UnsupportedSystemError
from openmm_se3.force import create_forces
from openmm_se3.replicas import check_batch
from tests.openmm_se3.helpers import energy_and_forces, ethanol, numbers, potential

TOLERANCE = 1e-4  # kJ/mol and kJ/mol/nm


@pytest.fixture
def several():
    """Three distorted ethanols, a carbon monoxide and a lone atom, on top of each other, atoms shuffled: topology, positions, molecule of each."""
    random = np.random.default_rng(3)
    topology, x = ethanol()
    symbols, positions, batch = [], [], []
    for k in range(3):
        symbols += [a.element.symbol for a in topology.atoms()]
        positions.append(x + random.normal(scale=0.004, size=x.shape))
        batch += [k] * len(x)
    symbols += ["C", "O", "H"]
    positions.append(np.array([[0, 0, 0], [0.07, 0.08, 0.04], [0.1, 0, 0]]))
    batch += [7, 7, -1]  # any whole numbers
    order = random.permutation(len(symbols))
    made = app.Topology()
    residue = made.addResidue("MIX", made.addChain())
    for i in order:
        made.addAtom(symbols[i], app.Element.getBySymbol(symbols[i]), residue)
    return made, np.concatenate(positions)[order], [batch[i] for i in order]


@pytest.mark.parametrize("mode", ["direct", "conservative", "mts", "mts-fast"])
def test_each_is_as_if_alone(mode, several):
    topology, x, batch = several
    energy, forces = energy_and_forces(potential(mode).createSystem(topology, batch=batch), x, groups={1} if mode.startswith("mts") else -1)
    model, z = potential(mode).model, numbers(topology)
    expected_energy, expected = 0.0, np.zeros_like(x)
    for k in set(batch):
        atoms = [i for i, b in enumerate(batch) if b == k]
        alone = torch.tensor(x[atoms], requires_grad=True)
        value, direct = model.energy_and_forces(alone, z[atoms], None)
        conservative = -torch.autograd.grad([value], [alone])[0]
        expected_energy += float(value)
        fast_energy, fast = model.fast(alone, z[atoms], None)
        expected_energy -= float(fast_energy) if mode == "mts-fast" else 0.0
        of_mode = {"direct": direct, "conservative": conservative, "mts": conservative - direct, "mts-fast": conservative - fast}
        expected[atoms] = of_mode[mode].numpy()
    assert energy == pytest.approx(expected_energy, abs=TOLERANCE)
    np.testing.assert_allclose(forces, expected, atol=TOLERANCE)


def test_python_force_and_a_subset_give_the_same(several):
    topology, x, batch = several
    atoms = [i for i, b in enumerate(batch) if b in (0, 2)]
    se3, results = potential("direct"), []
    for backend in ("TorchForce", "PythonForce"):
        system = openmm.System()
        for _ in batch:
            system.addParticle(1.0)
        groups = check_batch([batch[i] for i in atoms], len(atoms), False)
        z = numbers(topology)[atoms].tolist()
        for force in create_forces(se3.model, se3.metadata, z, atoms, len(batch), False, "direct", 0, backend=backend, groups=groups):
            system.addForce(force)
        results.append(energy_and_forces(system, x))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-6)
    others = [i for i in range(len(batch)) if i not in atoms]
    assert not results[0][1][others].any()


def test_copies_move_as_one_alone_does():
    """Through openmm-ml's own door, with as many copies as fill more than one layer of the lattice."""
    topology, x = ethanol()
    many, positions, batch = replicate(topology, x, 9)
    assert many.getNumChains() == 9
    np.testing.assert_allclose(positions[9:18] - positions[:9], np.tile([np.ptp(x[:, 0]) + 1.0, 0, 0], (9, 1)), atol=1e-12)
    ends = []
    for system, start in ((potential("direct").createSystem(topology), x), (potential("direct").createSystem(many, batch=batch), positions)):
        integrator = openmm.VerletIntegrator(0.5 * unit.femtosecond)
        context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
        context.setPositions(start)
        integrator.step(3)
        ends.append(context.getState(getPositions=True).getPositions(asNumpy=True)._value - start)
    np.testing.assert_allclose(ends[1], np.tile(ends[0], (9, 1)), atol=1e-9)


def test_openmmml_passes_it_on(several):
    pytest.importorskip("openmmml")
    from openmmml import MLPotential

    topology, x, batch = several
    got, expected = (
        energy_and_forces(made.createSystem(topology, batch=batch), x)[0]
        for made in (MLPotential("se3", potential=potential("direct")), potential("direct"))
    )
    assert got == pytest.approx(expected, abs=1e-9)


def test_positions_with_a_unit():
    topology, x = ethanol()
    expected = replicate(topology, x, 2)[1]
    vectors = [openmm.Vec3(*row) for row in x]
    for given in (x * unit.nanometer, (10 * x) * unit.angstrom, vectors * unit.nanometer, vectors, [v * unit.nanometer for v in vectors]):
        np.testing.assert_allclose(replicate(topology, given, 2)[1], expected, atol=1e-12)


class TestRefusals:
    @pytest.mark.parametrize("batch", [[0] * 8, [0.5] * 9, [[0] * 9]])
    def test_not_one_whole_number_for_each_atom(self, batch):
        with pytest.raises(ValueError, match="one whole number for each of the 9 atoms"):
            potential("direct").createSystem(ethanol()[0], batch=batch)

    def test_periodic(self):
        topology, x = ethanol()
        topology.setUnitCellDimensions(openmm.Vec3(2, 2, 2) * unit.nanometer)
        with pytest.raises(UnsupportedSystemError, match="the System is periodic"):
            potential("direct").createSystem(topology, batch=[0] * 9)
        with pytest.raises(UnsupportedSystemError, match="has a periodic box"):
            replicate(topology, x, 2)

    def test_positions_of_something_else(self):
        topology, x = ethanol()
        with pytest.raises(ValueError, match=r"positions must be \(9, 3\).* got \(8, 3\)"):
            replicate(topology, x[:8], 2)

    def test_no_copies(self):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            replicate(*ethanol(), 0)
