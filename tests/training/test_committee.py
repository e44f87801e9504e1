"""A committee in one file: the mean of its members and the deviation of their forces, against the members one by one."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.clusters import NUMBERS, random_cluster, random_orthogonal
from openmm_se3.model_file import load_model, read_metadata
from tests.training.helpers import sample_dataset, small_config, small_network
from training.__main__ import app
from training.checkpoint import CheckpointError, initial_weights, load_checkpoint
from training.committee import ExportedCommittee, force_deviations
from training.export import ExportError, export
from training.exported import ExportedModel
from training.fit import fit
from training.units import KJ_PER_MOL_PER_EV

BOX = torch.tensor([[0.9, 0, 0], [0.2, 0.95, 0], [-0.3, 0.1, 1.0]], dtype=torch.float64)


def test_deviation_by_hand():
    """Two members: forces on the first atom differ by 2 along x, on the second by 6 along y and 8 along z, on the third not at all."""
    forces = torch.tensor([[[1.0, 0, 0], [0, 3, 4], [5, 5, 5]], [[-1.0, 0, 0], [0, -3, -4], [5, 5, 5]]])
    assert force_deviations(forces).tolist() == [1.0, 5.0, 0.0]


@pytest.fixture(scope="module")
def networks():
    return [small_network(seed).double().eval() for seed in range(3)]


@pytest.fixture(scope="module")
def scripted(networks):
    return torch.jit.script(ExportedCommittee(networks, NUMBERS).double().eval())


@pytest.mark.parametrize("n_atoms", [1, 8, 40])  # alone; all pairs; neighbours listed
@pytest.mark.parametrize("box", [None, BOX], ids=["free", "periodic"])
def test_mean_and_deviation_of_the_members(networks, scripted, n_atoms, box):
    species, positions = random_cluster(n_atoms, seed=3, spread=2.5)
    x, z = positions / 10, torch.tensor(NUMBERS)[species]
    members = [ExportedModel(network, NUMBERS).double().eval()(x, z, box) for network in networks]
    energies, forces = torch.stack([e for e, _ in members]), torch.stack([f for _, f in members]).numpy()
    energy, force = scripted(x, z, box)
    assert float(energy) == pytest.approx(float(energies.mean()), abs=1e-9)
    np.testing.assert_allclose(force, forces.mean(0), atol=1e-8)
    expected = np.sqrt(forces.var(0).sum(-1))
    got = scripted.deviations(x, z, box)
    np.testing.assert_allclose(got, expected, atol=1e-8)
    assert (got.max() > 1e-3) == (n_atoms > 1)  # they do disagree, except about an atom that is alone
    both = scripted.energy_and_forces(x, z, box)
    assert float(both[0]) == pytest.approx(float(energy), abs=1e-9)
    np.testing.assert_allclose(both[1], force, atol=1e-8)


def test_gradient_of_the_energy_is_the_mean_gradient(networks, scripted):
    species, positions = random_cluster(8, seed=4)
    z = torch.tensor(NUMBERS)[species]

    def gradient(energy):
        x = (positions / 10).requires_grad_(True)
        return torch.autograd.grad([energy(x, z)], [x])[0]

    members = [gradient(ExportedModel(network, NUMBERS).double().eval().energy) for network in networks]
    torch.testing.assert_close(gradient(scripted.energy), torch.stack(members).mean(0), atol=1e-8, rtol=0)
    energy, conservative, direct = scripted.conservative_and_direct(positions / 10, z)
    torch.testing.assert_close(-conservative, torch.stack(members).mean(0), atol=1e-8, rtol=0)
    torch.testing.assert_close((energy, direct), scripted(positions / 10, z), atol=1e-8, rtol=0)


def test_deviations_are_invariant_and_poisoned_like_the_forces(scripted):
    species, positions = random_cluster(8, seed=5)
    x, z = positions / 10, torch.tensor(NUMBERS)[species]
    before = scripted.deviations(x, z)
    torch.testing.assert_close(scripted.deviations(x @ random_orthogonal(1, True).T + 2.0, z), before, atol=1e-8, rtol=0)
    assert scripted.deviations(x.float(), z).dtype == torch.float32
    assert torch.isnan(scripted.deviations(x, torch.where(z == z[0], 17, z))).any()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint of thirty steps, and two with other weights; one more with another cutoff."""
    directory = tmp_path_factory.mktemp("members")
    fit(small_config(sample_dataset(directory).directory, max_steps=30), directory / "run", accelerator="cpu")
    paths = []
    for k in range(3):
        raw = torch.load(directory / "run" / "last.ckpt", map_location="cpu", weights_only=True)
        generator = torch.Generator().manual_seed(k)
        for name, tensor in raw["state_dict"].items():
            if name.startswith("ema.module.") and tensor.is_floating_point() and tensor.dim() > 1:
                tensor.mul_(1 + 0.01 * k * torch.randn(tensor.shape, generator=generator))
        raw["openmm_se3"]["data"]["self_energies"]["H"] += 0.3 * k
        paths.append(directory / f"member{k}.ckpt")
        torch.save(raw, paths[-1])
    raw["openmm_se3"]["config"]["network"]["cutoff"] = 3.5
    torch.save(raw, directory / "other.ckpt")
    return paths


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    output = tmp_path_factory.mktemp("committee") / "three.pt"
    checks = export(checkpoints, output, licence="CC0-1.0")
    assert all(c.passed for c in checks)
    assert sum("deviations" in c.name for c in checks) == 6
    return output


class TestExport:
    def test_one_file_says_how_many_it_holds(self, exported, checkpoints):
        metadata = read_metadata(exported)
        assert metadata.n_members == 3
        assert metadata.name == "three"
        assert [m["steps"] for m in metadata.training_data["members"]] == [30, 30, 30]
        members = [load_checkpoint(c) for c in checkpoints]
        assert metadata.n_parameters == sum(p.numel() for m in members for p in m.network.parameters())
        expected = np.mean([m.data["self_energies"]["H"] for m in members]) * KJ_PER_MOL_PER_EV
        assert metadata.self_energies["H"] == pytest.approx(expected)
        golden = metadata.golden[0]
        x, z = torch.tensor(golden.positions_nm, dtype=torch.float64), torch.tensor(golden.atomic_numbers)
        singles = [ExportedModel(m.network, NUMBERS).double().eval()(x, z) for m in members]
        assert golden.energy == pytest.approx(np.mean([float(energy) for energy, _ in singles]), abs=1e-6)
        deviations = force_deviations(torch.stack([forces for _, forces in singles]))
        torch.testing.assert_close(load_model(exported).double().deviations(x, z), deviations, atol=1e-6, rtol=0)

    def test_no_run_starts_from_a_committee(self, exported, checkpoints):
        with pytest.raises(CheckpointError, match="is a committee of 3 networks; give the checkpoint of one"):
            initial_weights(str(exported), small_config(checkpoints[0].parent / "packed").network)

    def test_refusals(self, checkpoints, tmp_path):
        with pytest.raises(ExportError, match=r"must agree in cutoff .*has 4.0, .*other.ckpt has 3.5"):
            export([checkpoints[0], checkpoints[0].with_name("other.ckpt")], tmp_path / "x.pt")
        twice = CliRunner().invoke(app, ["export", str(checkpoints[1]), str(checkpoints[1]), str(tmp_path / "x.pt")])
        assert twice.exit_code == 1
        assert "hold the same weights" in twice.output
        assert not (tmp_path / "x.pt").exists()
