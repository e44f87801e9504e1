"""The committee's reporter: what it writes, whom it names, when it stops, with deviations that are known."""

import csv
import warnings

import numpy as np
import openmm
import pytest
import torch
from ase.build import molecule
from openmm import app, unit

from openmm_se3 import CommitteeReporter, SE3Potential, replicate
from openmm_se3.committee import UncertaintyError, UncertaintyWarning
from openmm_se3.errors import UnsupportedSystemError
from openmm_se3.structures import topology_of
from tests.openmm_se3.helpers import ethanol, potential
from tests.openmm_se3.physics.models import write_model


class Tug(torch.nn.Module):
    """Two members: forces of +k and -k times each position, so each atom deviates by k |x|; in a box, by twice that."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.register_buffer("k", torch.tensor(k))

    def forward(
        self, positions: torch.Tensor, atomic_numbers: torch.Tensor, box_vectors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.energy(positions, atomic_numbers, box_vectors), torch.zeros_like(positions)

    @torch.jit.export
    def energy(self, positions: torch.Tensor, atomic_numbers: torch.Tensor, box_vectors: torch.Tensor | None = None) -> torch.Tensor:
        return 0.0 * positions.to(torch.float64).sum()

    @torch.jit.export
    def deviations(self, positions: torch.Tensor, atomic_numbers: torch.Tensor, box_vectors: torch.Tensor | None = None) -> torch.Tensor:
        twice = 1.0 if box_vectors is None else 2.0
        return twice * self.k.to(positions) * positions.square().sum(1).sqrt()


class TugOfNumbers(Tug):
    """The deviations grow with the number of atoms that there are."""

    @torch.jit.export
    def deviations(self, positions: torch.Tensor, atomic_numbers: torch.Tensor, box_vectors: torch.Tensor | None = None) -> torch.Tensor:
        return positions.shape[0] * self.k.to(positions) * positions.square().sum(1).sqrt()


@pytest.fixture(scope="module")
def committee(tmp_path_factory):
    return SE3Potential(write_model(Tug(100.0), tmp_path_factory.mktemp("tug") / "tug.pt", n_members=2), precision="double")


def at_rest(topology, positions, model):
    """A Simulation of the committee, whose mean pulls nobody: the atoms stay where they are."""
    system = model.createSystem(topology)
    simulation = app.Simulation(topology, system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    simulation.context.setPositions(positions)
    return simulation


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_columns(committee, tmp_path):
    topology, x = ethanol()
    simulation = at_rest(topology, x, committee)
    simulation.reporters.append(CommitteeReporter(tmp_path / "deviation.csv", 5, committee, topology))
    simulation.step(12)
    expected = 100 * np.linalg.norm(x, axis=1)
    written = rows(tmp_path / "deviation.csv")
    assert [int(r["step"]) for r in written] == [5, 10]
    assert float(written[1]["time_ps"]) == pytest.approx(0.01)
    for row in written:
        assert float(row["max_deviation_kj_per_mol_nm"]) == pytest.approx(expected.max(), rel=1e-5)
        assert float(row["mean_deviation_kj_per_mol_nm"]) == pytest.approx(expected.mean(), rel=1e-5)
        assert int(row["atom"]) == expected.argmax()
    simulation.reporters[:] = [CommitteeReporter(tmp_path / "deviation.csv", 5, committee, topology, append=True)]
    simulation.step(3)
    assert [int(r["step"]) for r in rows(tmp_path / "deviation.csv")] == [5, 10, 15]


def test_stop_names_atoms_worst_first(committee, tmp_path):
    topology, x = ethanol()
    x = x - x.mean(0)
    order = np.argsort(-np.linalg.norm(x, axis=1))
    deviation = 100 * np.linalg.norm(x, axis=1)[order]
    simulation = at_rest(topology, x, committee)
    threshold = (deviation[1] + deviation[2]) / 2 * unit.kilojoule_per_mole / unit.nanometer
    reporter = CommitteeReporter(tmp_path / "deviation.csv", 2, committee, topology, threshold=threshold, action="stop")
    simulation.reporters.append(reporter)
    symbols = [a.element.symbol for a in topology.atoms()]
    named = ", ".join(rf"{i} \({symbols[i]}\): {d:.4g}" for i, d in zip(order[:2], deviation[:2], strict=True))
    with pytest.raises(UncertaintyError, match=rf"step 2: .* forces on atoms {named}; "):
        simulation.step(10)
    assert len(rows(tmp_path / "deviation.csv")) == 1  # what stopped the run is written


def test_warning_goes_on(committee, tmp_path):
    topology, x = ethanol()
    simulation = at_rest(topology, x, committee)
    limit = 100 * np.linalg.norm(x, axis=1).max()
    simulation.reporters.append(CommitteeReporter(tmp_path / "a.csv", 2, committee, topology, threshold=1.01 * limit))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulation.step(4)
    simulation.reporters[:] = [CommitteeReporter(tmp_path / "b.csv", 2, committee, topology, threshold=0.99 * limit)]
    with pytest.warns(UncertaintyWarning, match="deviate by more than") as caught:
        simulation.step(4)
    assert len(caught) == 2
    assert len(rows(tmp_path / "b.csv")) == 2


def test_what_is_not_finite_is_above_any_threshold(committee, tmp_path):
    topology, x = ethanol()
    reporter = CommitteeReporter(tmp_path / "a.csv", 1, committee, topology, threshold=1e9, action="stop")
    simulation = at_rest(topology, x, committee)
    x[3, 0] = np.nan
    simulation.context.setPositions(x)
    with pytest.raises(UncertaintyError, match=r"atoms 3 \(H\): nan"):
        reporter.report(simulation, simulation.context.getState(getPositions=True))


def test_some_atoms_in_a_box(committee, tmp_path):
    """The atoms of a mixed System, in any order, with the box handed on."""
    waters = molecule("H2O")
    waters += waters
    waters.positions[3:] += 5.0
    topology, x = topology_of(waters), waters.positions / 10
    topology.setPeriodicBoxVectors(np.diag([2.0, 2.1, 2.2]) * unit.nanometer)
    reporter = CommitteeReporter(tmp_path / "a.csv", 1, committee, topology, atoms=[5, 3, 4])
    simulation = at_rest(topology, x, committee)
    deviations = reporter.deviations(simulation.context.getState(getPositions=True))
    np.testing.assert_allclose(deviations, 200 * np.linalg.norm(x[[5, 3, 4]], axis=1))
    reporter.report(simulation, simulation.context.getState(getPositions=True))
    assert int(rows(tmp_path / "a.csv")[0]["atom"]) == [5, 3, 4][int(deviations.argmax())]


def test_copies_are_looked_at_one_by_one(tmp_path):
    """Wherever they are; they see each other only without `batch`."""
    committee = SE3Potential(write_model(TugOfNumbers(100.0), tmp_path / "tug.pt", n_members=2), precision="double")
    topology, x = ethanol()
    many, positions, batch = replicate(topology, x, 2)
    state = at_rest(many, positions, committee).context.getState(getPositions=True)
    one = 100 * np.linalg.norm(positions, axis=1)
    deviations = [CommitteeReporter(tmp_path / "a.csv", 1, committee, many, batch=b).deviations(state) for b in (batch, None)]
    np.testing.assert_allclose(deviations[0], 9 * one)
    np.testing.assert_allclose(deviations[1], 18 * one)
    shuffled = np.random.default_rng(0).permutation(18)
    reporter = CommitteeReporter(tmp_path / "a.csv", 1, committee, many, atoms=shuffled.tolist(), batch=[batch[i] for i in shuffled])
    np.testing.assert_allclose(reporter.deviations(state), 9 * one[shuffled])


def test_cut_bonds_need_their_caps(committee, tmp_path):
    topology, _ = ethanol()
    methyl = [0, 3, 4, 5]  # whose carbon is bonded to atom 1
    with pytest.raises(UnsupportedSystemError, match=r"1 bonds lead from atoms to others, the first that of 0 and 1, .* returnInfo=True"):
        CommitteeReporter(tmp_path / "a.csv", 1, committee, topology, atoms=methyl)
    system = openmm.System()
    for atom in topology.atoms():
        system.addParticle(atom.element.mass)
    made = potential("direct").createMixedSystem(topology, system, methyl, returnInfo=True)["topology"]
    assert made.getNumAtoms() == 10
    CommitteeReporter(tmp_path / "a.csv", 1, committee, made, atoms=[*methyl, 9])


def test_refusals(committee, tmp_path):
    topology, _ = ethanol()
    file = tmp_path / "a.csv"
    with pytest.raises(ValueError, match=r"is one network.*export A.ckpt B.ckpt"):
        CommitteeReporter(file, 1, potential("direct"), topology)
    with pytest.raises(ValueError, match="reportInterval must be positive, got 0"):
        CommitteeReporter(file, 0, committee, topology)
    with pytest.raises(ValueError, match="threshold must be positive"):
        CommitteeReporter(file, 1, committee, topology, threshold=-1.0)
    with pytest.raises(ValueError, match="action must be one of 'warn', 'stop', got 'shout'"):
        CommitteeReporter(file, 1, committee, topology, action="shout")
    untrained = write_model(Tug(100.0), tmp_path / "untrained.pt", n_members=2, untrained=["direct"])
    with pytest.raises(ValueError, match="were not trained for direct forces, which are what is compared"):
        CommitteeReporter(file, 1, SE3Potential(untrained, forces="conservative"), topology)
    with pytest.raises(UnsupportedSystemError, match="but the topology has atoms 0 to 8"):
        CommitteeReporter(file, 1, committee, topology, atoms=[9])
    with pytest.raises(ValueError, match="batch must hold one whole number for each of the 9 atoms"):
        CommitteeReporter(file, 1, committee, topology, batch=[0])
    assert not file.exists()
