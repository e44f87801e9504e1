"""What CUDA graphs need, as far as a machine without a GPU can tell; `python -m benchmarks gpu` captures and replays them."""

import itertools

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from benchmarks.systems import water_box
from openmm_se3 import SE3Potential, cuda_graphs, force, simulate
from openmm_se3.binding import TERMS, bind, in_place
from openmm_se3.cuda_graphs import has_fixed_shapes, needs_width, width_for, with_width
from openmm_se3.model_file import load_model
from openmm_se3.replicas import replicate

GRID = 0.3 * np.array(list(itertools.product(range(4), repeat=3)), dtype=float)


@pytest.fixture(scope="module")
def model():
    return load_model("se3-ani1x")


def evaluate(potential, topology, positions):
    system = potential.createSystem(topology, removeCMMotion=False)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    state = context.getState(getEnergy=True, getForces=True)
    return state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value


class TestWidth:
    @pytest.mark.parametrize(
        ("box", "cutoff", "most"), [(None, 0.31, 6), (None, 0.5, 18), (np.eye(3) * 1.2, 0.31, 6), (np.eye(3) * 1.2 * unit.nanometer, 0.5, 18)]
    )
    def test_is_that_of_the_fullest_atom_and_a_little_more(self, box, cutoff, most):
        width = width_for(GRID, box, cutoff)
        assert width % 8 == 0
        assert cuda_graphs.MARGIN * most <= width < cuda_graphs.MARGIN * most + 8

    def test_of_atoms_without_neighbours(self):
        assert width_for(10 * GRID, None, 0.5) == 8

    def test_is_set_in_a_copy_and_in_its_fast_network(self, model):
        copy = with_width(model, 40)
        assert (copy.max_neighbors, copy.fast_model.max_neighbors) == (40, 40)
        assert (model.max_neighbors, model.fast_model.max_neighbors) == (0, 0)

    def test_of_a_file_that_knows_of_none(self):
        class Old(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x

        old = torch.jit.script(Old())
        assert with_width(old, 40) is old
        assert not has_fixed_shapes(old, 20)

    def test_of_a_run(self, model, tmp_path):
        topology, positions = water_box(66)
        box = topology.getPeriodicBoxVectors()
        assert simulate._width(model, "Reference", topology, positions) is None
        assert simulate._width(model, "CUDA", topology, positions[:128]) is None  # few atoms need none
        assert simulate._width(model, "CUDA", topology, positions) == width_for(positions, topology.getPeriodicBoxVectors(), 0.5)
        # One that goes on from a denser state, in a smaller box.
        system = openmm.System()
        for _ in positions:
            system.addParticle(1.0)
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
        context.setPeriodicBoxVectors(*(0.9 * box))
        context.setPositions(0.9 * positions)
        (tmp_path / simulate.STATE_FILE).write_text(openmm.XmlSerializer.serialize(context.getState(getPositions=True)))
        denser = simulate._width(model, "CUDA", topology, positions, tmp_path)
        assert denser == width_for(0.9 * positions, 0.9 * box, 0.5) > width_for(positions, box, 0.5)


def test_sizes_with_fixed_shapes(model):
    wide = with_width(model, 40)
    assert [has_fixed_shapes(model, n) for n in (1, 2, 128, 129, 2000)] == [False, True, True, False, False]
    assert [has_fixed_shapes(wide, n) for n in (1, 128, 129, 2000, 2001)] == [False, True, True, True, False]
    assert [needs_width(model, n) for n in (1, 128, 129, 2000, 2001)] == [False, False, True, True, False]


class TestMaxNeighbors:
    @pytest.mark.parametrize("forces", ["direct", "conservative", "mts-fast"])
    def test_changes_nothing_where_it_is_enough(self, forces):
        topology, positions = water_box(66)
        width = width_for(positions, topology.getPeriodicBoxVectors(), 0.5)
        energy, found = evaluate(SE3Potential(forces=forces, precision="double", max_neighbors=width), topology, positions)
        right_energy, right = evaluate(SE3Potential(forces=forces, precision="double"), topology, positions)
        assert abs(energy - right_energy) < 1e-9 * abs(right_energy)
        assert np.abs(found - right).max() < 1e-9 * np.abs(right).max()

    def test_is_for_sizes_that_need_one(self):
        """Few atoms have fixed shapes without, and are not refused for a width that they do not use."""
        topology, positions = water_box(40)
        energy, found = evaluate(SE3Potential(max_neighbors=8), topology, positions)
        right_energy, right = evaluate(SE3Potential(), topology, positions)
        assert energy == right_energy
        assert np.array_equal(found, right)

    def test_too_small_a_one_gives_nan_and_no_plausible_number(self):
        topology, positions = water_box(66)
        energy, found = evaluate(SE3Potential(max_neighbors=16), topology, positions)
        assert np.isnan(energy)
        assert np.isnan(found).all()

    def test_must_be_positive(self):
        with pytest.raises(ValueError, match="max_neighbors must be a whole number of at least 1"):
            SE3Potential(max_neighbors=0)


class TestInPlace:
    def test_results_stay_in_their_memory_and_are_right(self, model):
        x, y = (torch.tensor(GRID[:5] * scale, dtype=torch.float32) for scale in (0.4, 0.5))
        bound = bind(model, TERMS["conservative"][0], [6, 1, 1, 1, 1], range(5), 5)
        scripted = torch.jit.script(in_place(bound))
        first, second = torch.jit.freeze(scripted), torch.jit.freeze(scripted)  # as of two Contexts
        of_x = first(x)
        addresses = [r.data_ptr() for r in of_x]
        kept = [r.clone() for r in of_x]
        of_y = first(y)
        assert [r.data_ptr() for r in of_y] == addresses
        for found, expected in zip(of_y, bound(y), strict=True):
            torch.testing.assert_close(found, expected)
        again = second(x)
        assert not {r.data_ptr() for r in again} & set(addresses)
        for found, expected in zip(again, kept, strict=True):
            torch.testing.assert_close(found, expected)
        assert not torch.equal(of_x[1], kept[1])  # the same memory


class TestTrying:
    """With a GPU that is only said to be there."""

    @pytest.fixture
    def tried(self, monkeypatch):
        calls, outcome = [], []

        def capture(bound, atoms, n_particles, box_nm):
            calls.append((len(atoms), n_particles, box_nm is not None))
            return outcome[0] if outcome else None

        monkeypatch.setattr(force, "has_gpu", lambda: True)
        monkeypatch.setattr(cuda_graphs, "_try", capture)
        return calls, outcome

    @staticmethod
    def properties(potential, topology, **arguments):
        system = openmm.System()
        for _ in topology.atoms():
            system.addParticle(1.0)
        if topology.getPeriodicBoxVectors() is not None:
            system.setDefaultPeriodicBoxVectors(*topology.getPeriodicBoxVectors())
        return [f.getProperties()["useCUDAGraphs"] for f in potential.addForces(topology, system, **arguments)]

    @pytest.fixture
    def ethanol(self):
        topology = app.Topology()
        residue = topology.addResidue("ETH", topology.addChain())
        for symbol in "CCOHHHHHH":
            topology.addAtom(symbol, app.Element.getBySymbol(symbol), residue)
        return topology

    def test_once_for_each_kind_of_force(self, tried, ethanol):
        potential = SE3Potential(forces="mts")
        assert self.properties(potential, ethanol) == ["true", "true"]
        assert self.properties(potential, ethanol, atoms=range(5)) == ["true", "true"]
        assert tried[0] == [(9, 9, False)] * 2

    def test_what_fails_is_announced_and_off(self, tried, ethanol):
        tried[1].append("capturing failed (no)")
        with pytest.warns(UserWarning, match=r"se3-ani1x \(direct\) runs without CUDA graphs.*capturing failed \(no\)"):
            assert self.properties(SE3Potential(), ethanol) == ["false"]

    def test_not_with_a_parameter_that_scales_nor_where_it_is_not_wanted(self, tried, ethanol):
        assert self.properties(SE3Potential(), ethanol, scaleParameter="scale") == ["false"]
        assert self.properties(SE3Potential(cuda_graphs=False), ethanol) == ["false"]
        assert tried[0] == []

    def test_larger_systems_need_a_width(self, tried):
        topology, _ = water_box(66)
        assert self.properties(SE3Potential(), topology) == ["false"]
        assert self.properties(SE3Potential(max_neighbors=88), topology) == ["true"]
        assert tried[0] == [(198, 198, True)]

    def test_copies_have_the_width_of_their_molecule(self, tried, ethanol):
        many, _, batch = replicate(ethanol, 0.1 * GRID[:9], 20)
        assert self.properties(SE3Potential(), many, batch=batch) == ["true"]
        assert tried[0] == [(180, 180, False)]

    def test_copies_are_another_kind(self, tried, ethanol):
        potential = SE3Potential()
        many, _, batch = replicate(ethanol, 0.1 * GRID[:9], 2)
        self.properties(potential, many)
        self.properties(potential, many, batch=batch)
        self.properties(potential, many, batch=batch)
        assert tried[0] == [(18, 18, False)] * 2

    def test_results_are_those_without(self, tried, ethanol):
        x = 0.4 * GRID[:9]
        energy, found = evaluate(SE3Potential(), ethanol, x)
        right_energy, right = evaluate(SE3Potential(cuda_graphs=False), ethanol, x)
        assert energy == right_energy
        assert np.array_equal(found, right)


@pytest.mark.parametrize(
    ("force_error", "energy_error", "message"),
    [
        (1e-3, 1e-3, None),
        (1.0, 0.0, "replayed forces differ by 1.0e+00 kJ/mol/nm from those evaluated, of which the largest is 1.0e+02"),
        (0.0, 1.0, "the replayed energy differs by 1.0e+00 kJ/mol from that evaluated, -5.0e+01"),
        (np.nan, 0.0, "replayed forces differ by nan"),
        (0.0, np.nan, "the replayed energy differs by nan"),
    ],
)
def test_what_differs_is_named(force_error, energy_error, message):
    energy, forces = torch.tensor(-50.0, dtype=torch.float64), torch.full((2, 3), 100.0)
    found = cuda_graphs._difference(energy + energy_error, forces + force_error, energy, forces)
    assert found == message or found.startswith(message)


def test_structures_to_compare_hold_the_atoms_and_fit_their_box():
    atoms = [7, 2, 5]
    here, there, box = cuda_graphs._structures(atoms, 9, 1.05)
    assert here.shape == there.shape == (9, 3)
    assert np.abs(here - there)[atoms].min() > 0
    assert np.abs(here[[0, 1, 3, 4, 6, 8]]).max() == 0
    assert np.linalg.norm(here[atoms][:, None] - here[atoms][None], axis=-1)[~np.eye(3, dtype=bool)].min() > 0.15
    assert np.array_equal(box, 1.05 * np.eye(3))


def test_libraries_that_could_not_be_loaded_with_openmm_are_tried_again(monkeypatch):
    failures = [
        "Error loading library /a b/libOpenMMTorchOpenCL.so: libOpenCL.so.1: no",
        "Error loading library /a b/libOpenMMTorchReference.so: libtorch.so: no",
    ]
    failures.append("Error loading library /a b/libOpenMMOpenCL.so: libOpenCL.so.1: no")
    tried = []

    def load(path):
        tried.append(path)
        if "OpenCL" in path:
            raise openmm.OpenMMException("still not there")

    monkeypatch.setattr(openmm.Platform, "getPluginLoadFailures", staticmethod(lambda: failures))
    monkeypatch.setattr(openmm.Platform, "loadPluginLibrary", staticmethod(load))
    force._load_late()
    assert tried == ["/a b/libOpenMMTorchOpenCL.so", "/a b/libOpenMMTorchReference.so"]
