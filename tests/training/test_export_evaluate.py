"""Checkpoint to exported file to metrics, and the command line around them."""

import io
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import read, write
from typer.testing import CliRunner

from openmm_se3 import SE3Potential
from openmm_se3.binding import modes_of
from openmm_se3.model_file import GoldenStructure, find_model, load_model
from openmm_se3.simulate import simulate
from openmm_se3.simulation_settings import SimulationSettings
from tests.training.helpers import KEYS, SAMPLE, distorted_waters, sample_dataset, small_config
from training.__main__ import app
from training.checkpoint import NETWORK_FILE, CheckpointError, initial_weights, load_checkpoint, load_exported
from training.data.prepare import prepare
from training.evaluate import evaluate
from training.export import ExportError, _check_fits, check_parity, export
from training.exported import ExportedModel
from training.fit import fit


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run and its exported file."""
    directory = tmp_path_factory.mktemp("trained")
    dataset = sample_dataset(directory)
    fit(small_config(dataset.directory, max_steps=20), directory / "run", accelerator="cpu")
    checks = export(directory / "run" / "last.ckpt", directory / "model.pt", licence="CC0-1.0")
    assert checks
    assert all(c.passed for c in checks)
    return directory


def test_metadata(trained):
    metadata = load_model(trained / "model.pt").metadata
    assert metadata.name == "model"
    assert metadata.elements == ["H", "C", "N", "O"]
    assert metadata.cutoff_nm == pytest.approx(0.4)
    assert metadata.licence == "CC0-1.0"
    assert "surrogate" in metadata.level_of_theory
    assert metadata.training_data["sources"] == ["ani1x_sample.h5"]
    assert len(metadata.golden) >= 3
    assert any(g.box_vectors_nm is not None for g in metadata.golden)


def test_elements_that_no_data_had_are_not_announced(tmp_path):
    """The network has weights for nitrogen and carbon, random ones."""
    write(tmp_path / "x.xyz", distorted_waters(12), format="extxyz")
    dataset = prepare([tmp_path / "x.xyz"], tmp_path / "packed", split_by="frame", validation=0.2, level_of_theory="none")
    config = small_config(dataset.directory)
    assert "N" in config.network.elements
    fit(config, tmp_path / "run", accelerator="cpu")
    export(tmp_path / "run" / "last.ckpt", tmp_path / "model.pt")
    model = load_model(tmp_path / "model.pt")
    assert model.metadata.elements == ["H", "O"]
    for name in ("H2O", "NH3", "CH4"):
        atoms = molecule(name)
        energy, forces = model(torch.tensor(atoms.positions / 10), torch.tensor(atoms.numbers), None)
        assert bool(torch.isfinite(energy)) == bool(torch.isfinite(forces).all()) == (name == "H2O")


def test_an_exported_file_is_exported_again(trained, tmp_path):
    again = tmp_path / "again.pt"
    metrics = {"test": {"force_rmse_mev_per_angstrom": 50.0}}
    export(trained / "run" / "last.ckpt", first_file := tmp_path / "first.pt", licence="CC0-1.0", citation="Someone (2026)", metrics=metrics)
    assert all(c.passed for c in export(first_file, again))
    before, after = load_model(first_file).metadata, load_model(again).metadata
    assert (after.licence, after.citation, after.metrics) == ("CC0-1.0", "Someone (2026)", metrics)
    for same in ("weights_sha256", "training_data", "level_of_theory", "cutoff_nm", "elements", "n_parameters"):
        assert getattr(after, same) == getattr(before, same), same
    assert after.self_energies == pytest.approx(before.self_energies, rel=1e-14)
    config = small_config(trained / "packed").network
    first, second = initial_weights(str(first_file), config), initial_weights(str(again), config)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_that_molecules_were_held_out_is_told_again(trained, tmp_path):
    raw = torch.load(trained / "run" / "last.ckpt", weights_only=True)
    raw["openmm_se3"]["data"]["hold_out_molecules"] = True
    torch.save(raw, tmp_path / "held-out.ckpt")
    export(tmp_path / "held-out.ckpt", tmp_path / "first.pt")
    export(tmp_path / "first.pt", tmp_path / "again.pt")
    assert [load_model(tmp_path / f"{name}.pt").metadata.training_data["hold_out_molecules"] for name in ("first", "again")] == [True, True]


class TestUntrainedForces:
    """A head that had no weight in the loss gives numbers all the same, so the file says so, and nobody is driven by them."""

    @pytest.mark.parametrize(
        ("weights", "untrained"),
        [
            ({"force_weight": 0.0, "conservative_weight": 1.0}, ["direct"]),
            ({"force_weight": 0.0}, ["direct"]),
            ({"energy_weight": 0.0}, ["conservative"]),
            ({}, []),
        ],
        ids=["conservative forces", "energies", "direct forces", "energies and direct forces"],
    )
    def test_is_what_the_loss_left_out(self, trained, tmp_path, weights, untrained):
        config = small_config(trained / "packed", max_steps=1)
        config = config.model_copy(update={"loss": config.loss.model_copy(update=weights)})
        fit(config, tmp_path / "run", accelerator="cpu")
        assert load_checkpoint(tmp_path / "run" / "last.ckpt").untrained == untrained

    @pytest.fixture(scope="class")
    @staticmethod
    def without_direct(trained, tmp_path_factory):
        directory = tmp_path_factory.mktemp("untrained")
        config = small_config(trained / "packed", max_steps=20)
        config = config.model_copy(update={"loss": config.loss.model_copy(update={"force_weight": 0.0})})
        fit(config, directory / "run", accelerator="cpu")
        export(directory / "run" / "last.ckpt", directory / "once.pt")
        export(directory / "once.pt", directory / "model.pt")
        return directory

    def test_is_told_by_the_file_also_if_it_is_written_anew(self, without_direct):
        model = load_model(without_direct / "model.pt")
        assert model.metadata.untrained == ["direct"]
        assert modes_of(model) == ("conservative",)

    def test_of_one_member_is_that_of_the_committee(self, trained, without_direct, tmp_path):
        export([trained / "run" / "last.ckpt", without_direct / "run" / "last.ckpt"], tmp_path / "both.pt")
        assert load_model(tmp_path / "both.pt").metadata.untrained == ["direct"]

    def test_drives_nothing(self, without_direct, tmp_path):
        file = without_direct / "model.pt"
        for forces in ("direct", "mts"):
            with pytest.raises(ValueError, match=f"not trained for direct forces, which forces='{forces}' needs: .* Use forces='conservative'"):
                SE3Potential(file, forces=forces)
        write(tmp_path / "water.xyz", molecule("H2O"))
        simulate(SimulationSettings(str(tmp_path / "water.xyz"), model=str(file), steps=1, minimize=False, platform="Reference"), tmp_path / "md")
        assert json.loads((tmp_path / "md" / "settings.json").read_text())["forces"] == "conservative"


class TestFastNetwork:
    """A second network for the inner steps of multiple time stepping, of one layer and a shorter cutoff."""

    @pytest.fixture(scope="class")
    @staticmethod
    def fast(trained):
        config = small_config(trained / "packed", max_steps=2)
        network = replace(config.network, num_layers=1, cutoff=3.0, channels=(6, 5, 3))
        fit(config.model_copy(update={"network": network}), trained / "fast", accelerator="cpu")
        return trained / "fast" / "last.ckpt"

    @pytest.fixture(scope="class")
    @staticmethod
    def with_fast(trained, fast):
        assert all(c.passed for c in export(trained / "run" / "last.ckpt", trained / "with-fast.pt", fast=fast))
        return trained / "with-fast.pt"

    def test_it_is_the_network_of_the_checkpoint_and_changes_nothing_else(self, trained, fast, with_fast):
        model, alone = load_model(with_fast).double(), load_model(trained / "model.pt").double()
        small = ExportedModel(load_checkpoint(fast).network, (1, 6, 7, 8)).double()
        golden = next(g for g in model.metadata.golden if g.box_vectors_nm is not None)
        x, z, box = torch.tensor(golden.positions_nm), torch.tensor(golden.atomic_numbers), torch.tensor(golden.box_vectors_nm, dtype=torch.float64)
        x = x.double()
        for got, expected in zip(model.fast(x, z, box), small.conservative_and_direct(x, z, box), strict=False):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-8)
        for got, expected in zip(model(x, z, box), alone(x, z, box), strict=True):
            assert torch.equal(got, expected)
        told = model.metadata.fast_network
        assert (told["cutoff_nm"], told["n_layers"]) == (pytest.approx(0.3), 1)
        assert told["n_parameters"] == sum(p.numel() for p in load_checkpoint(fast).network.parameters())
        assert told["training_data"]["steps"] == 2
        assert load_model(trained / "model.pt").metadata.fast_network == {}

    def test_it_is_kept_when_a_file_is_written_anew_and_can_be_lent(self, trained, fast, with_fast, tmp_path):
        export(with_fast, tmp_path / "again.pt")
        export(trained / "model.pt", tmp_path / "lent.pt", fast=with_fast)
        expected = load_checkpoint(fast).network.state_dict()
        for name in ("again.pt", "lent.pt"):
            loaded = load_exported(str(tmp_path / name))
            assert loaded.fast.step == 2
            assert all(torch.equal(w, expected[k]) for k, w in loaded.fast.network.state_dict().items())
            assert torch.equal(loaded.network.embedding.weight, load_checkpoint(trained / "run" / "last.ckpt").network.embedding.weight)
        assert load_exported(str(trained / "model.pt")).fast is None

    def test_refusals(self, trained, fast, tmp_path):
        with pytest.raises(ExportError, match=r"cutoff must not exceed the model's.*last.ckpt has 4.0 Angstrom.*has 3.0"):
            export(fast, tmp_path / "x.pt", fast=trained / "run" / "last.ckpt")
        with pytest.raises(ExportError, match="a committee has no fast network"):
            export([trained / "run" / "last.ckpt", fast], tmp_path / "x.pt", fast=fast)
        config = small_config(trained / "packed", max_steps=1)
        loaded = load_checkpoint(fast)
        loaded.config = config.model_copy(update={"network": replace(config.network, elements=("C", "H", "N", "O"))})
        with pytest.raises(ExportError, match="must know the elements of the model, in their order"):
            _check_fits(loaded, fast, config.network, trained / "run" / "last.ckpt")
        assert not (tmp_path / "x.pt").exists()

    def test_command_line_and_the_released_model(self, trained, tmp_path):
        arguments = ["export", str(trained / "run" / "last.ckpt"), str(tmp_path / "model.pt"), "--fast", "se3-ani1x"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        lent, released = (load_model(m).metadata.fast_network for m in (tmp_path / "model.pt", "se3-ani1x"))
        assert lent == released
        assert hasattr(load_model(tmp_path / "model.pt"), "fast")


def test_files_that_do_not_tell_the_sizes_of_their_network(tmp_path):
    """As files were before: weights alone. They are read with the sizes that released models have, or refused."""
    with zipfile.ZipFile(find_model("se3-ani1x")) as whole:
        attached = next(name for name in whole.namelist() if name.endswith(NETWORK_FILE))
        weights = torch.load(io.BytesIO(whole.read(attached)), weights_only=True)["weights"]

        def without_sizes(path, weights):
            buffer = io.BytesIO()
            torch.save(weights, buffer)
            with zipfile.ZipFile(path, "w") as copy:
                for name in whole.namelist():
                    copy.writestr(name, buffer.getvalue() if name == attached else whole.read(name))
            return str(path)

        loaded = load_exported(without_sizes(tmp_path / "usual.pt", weights))
        assert torch.equal(loaded.network.embedding.weight, weights["embedding.weight"])
        weights["embedding.weight"] = weights["embedding.weight"][:, :-1].clone()
        with pytest.raises(CheckpointError, match="does not tell the sizes of its network"):
            load_exported(without_sizes(tmp_path / "unusual.pt", weights))


@pytest.mark.parametrize("where", ["energy", "forces"])
def test_a_scripted_module_that_gives_no_number_is_refused(where):
    energy, forces = (float("nan") if where == name else 1.0 for name in ("energy", "forces"))
    golden = [GoldenStructure("H", [1], [[0.0, 0.0, 0.0]], None, 1.0, [[1.0, 1.0, 1.0]])]
    with pytest.raises(ExportError, match="differ by nan on H"):
        check_parity(lambda *_: (torch.tensor(energy), torch.full((1, 3), forces)), golden)


def test_existing_file_is_kept(trained):
    with pytest.raises(FileExistsError, match="exists already"):
        export(trained / "run" / "last.ckpt", trained / "model.pt")


def test_checkpoint_and_exported_file_have_the_same_errors(trained):
    from_checkpoint = evaluate(str(trained / "run" / "last.ckpt"), trained / "packed", split="validation")
    from_file = evaluate(str(trained / "model.pt"), trained / "packed", split="validation", output=trained / "metrics")
    for key, value in from_checkpoint.items():
        if key.endswith(("_kcal_per_mol", "_kcal_per_mol_per_angstrom")):
            assert from_file[key] == pytest.approx(value, rel=1e-3), key
    assert json.loads((trained / "metrics" / "metrics.json").read_text()) == from_file
    assert (trained / "metrics" / "parity.png").stat().st_size > 0
    with pytest.raises(FileExistsError, match="holds metrics already"):
        evaluate(str(trained / "model.pt"), trained / "packed", output=trained / "metrics")


def test_forces_are_kept_only_if_they_are_drawn(trained, monkeypatch):
    """Of a large data set they would fill the memory."""
    monkeypatch.setattr(np, "stack", lambda *_: 1 / 0)  # by which pairs of forces are kept
    found = evaluate(str(trained / "run" / "last.ckpt"), trained / "packed")
    assert found["force_rmse_mev_per_angstrom"] > 0


def test_raw_file_and_packed_data_give_the_same(trained):
    packed = evaluate(str(trained / "model.pt"), trained / "packed", max_frames=20)
    raw = evaluate(str(trained / "model.pt"), SAMPLE, max_frames=20, **KEYS)
    assert raw["force_rmse_kcal_per_mol_per_angstrom"] == pytest.approx(packed["force_rmse_kcal_per_mol_per_angstrom"], rel=1e-6)
    assert raw["energy_rmse_kcal_per_mol"] == pytest.approx(packed["energy_rmse_kcal_per_mol"], rel=1e-6)


def test_isolated_atoms_of_some_elements_do_not_matter(trained, tmp_path):
    """Errors are those of total energies; a file needs no self-energies, and those that it has are not used."""
    frame = molecule("H2O")
    frame.info["energy"], frame.arrays["forces"] = -2079.0, np.zeros((3, 3))
    write(tmp_path / "without.xyz", frame, format="extxyz")
    write(tmp_path / "with.xyz", [Atoms("H", info={"energy": -13.6}), frame], format="extxyz")
    without, with_atom = (evaluate(str(trained / "model.pt"), tmp_path / f"{name}.xyz") for name in ("without", "with"))
    assert with_atom["energy_rmse_mev"] == pytest.approx(without["energy_rmse_mev"])


def test_errors_are_those_of_a_plain_loop(trained):
    """The reported force RMSE against one computed molecule by molecule from the exported file."""
    from training.data.packed import PackedDataset
    from training.units import ANGSTROM_PER_NM, KCAL_PER_MOL_PER_EV, KJ_PER_MOL_PER_EV

    dataset = PackedDataset(trained / "packed")
    model = load_model(trained / "model.pt")
    total, count = 0.0, 0
    for frame in dataset.indices("validation"):
        atoms = slice(dataset.offsets[frame], dataset.offsets[frame + 1])
        x = torch.tensor(dataset.coordinates[atoms], dtype=torch.float64) / ANGSTROM_PER_NM
        _, forces = model(x, torch.tensor(dataset.numbers[atoms].astype(int)))
        error = forces.numpy() / KJ_PER_MOL_PER_EV / ANGSTROM_PER_NM - dataset.forces[atoms]
        total, count = total + float((error**2).sum()), count + error.size
    expected = (total / count) ** 0.5 * KCAL_PER_MOL_PER_EV
    got = evaluate(str(trained / "model.pt"), trained / "packed", split="validation")
    assert got["force_rmse_kcal_per_mol_per_angstrom"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("source", ["run/last.ckpt", "model.pt"])
def test_predictions_of_every_frame(trained, tmp_path, source):
    """What the file says gives the errors that are reported, frames in the order of the data."""
    from training.data.packed import PackedDataset

    dataset = PackedDataset(trained / "packed")
    metrics = evaluate(str(trained / source), trained / "packed", split="validation", output=tmp_path / "errors", predictions=True)
    frames = read(tmp_path / "errors" / "predictions.xyz", index=":")
    assert [atoms.info["frame"] for atoms in frames] == dataset.indices("validation").tolist()
    for atoms in frames:
        of_frame = slice(dataset.offsets[atoms.info["frame"]], dataset.offsets[atoms.info["frame"] + 1])
        np.testing.assert_array_equal(atoms.numbers, dataset.numbers[of_frame])
        np.testing.assert_allclose(atoms.positions, dataset.coordinates[of_frame], atol=1e-6)
        np.testing.assert_allclose(atoms.get_forces(), dataset.forces[of_frame], atol=1e-6)
        assert atoms.get_potential_energy() == pytest.approx(dataset.energies[atoms.info["frame"]], abs=1e-6)
    errors = {
        "energy": [atoms.info["model_energy"] - atoms.get_potential_energy() for atoms in frames],
        "force": np.concatenate([(atoms.arrays["model_direct_forces"] - atoms.get_forces()).ravel() for atoms in frames]),
        "conservative_force": np.concatenate([(atoms.arrays["model_conservative_forces"] - atoms.get_forces()).ravel() for atoms in frames]),
    }
    for name, error in errors.items():
        unit = "mev" if name == "energy" else "mev_per_angstrom"
        assert np.sqrt(np.mean(np.square(error))) * 1e3 == pytest.approx(metrics[f"{name}_rmse_{unit}"], rel=1e-4)
    with pytest.raises(ValueError, match="name one"):
        evaluate(str(trained / source), trained / "packed", predictions=True)


class TestCommandLine:
    def test_prepare_and_evaluate(self, trained, tmp_path):
        runner = CliRunner()
        keys = ["--energy-key", KEYS["energy_key"], "--force-key", KEYS["force_key"]]
        prepared = runner.invoke(app, ["prepare", str(SAMPLE), "-o", str(tmp_path / "packed"), *keys])
        assert prepared.exit_code == 0, prepared.output
        assert "Table 3.1" in prepared.output
        evaluated = runner.invoke(app, ["evaluate", str(trained / "model.pt"), str(tmp_path / "packed"), "--max-frames", "5"])
        assert evaluated.exit_code == 0, evaluated.output
        assert "force_rmse_kcal_per_mol_per_angstrom" in evaluated.output

    def test_brackets_in_messages_are_no_markup(self):
        assert "no[/b].h5" in CliRunner().invoke(app, ["prepare", "no[/b].h5", "-o", "x"]).output

    def test_paths_that_cannot_be_used(self, trained, tmp_path):
        """Found before the work is done, not after it; the message names the file."""
        (tmp_path / "file").write_bytes(b"\xff\xfe")
        for arguments, message in (
            (["prepare", str(SAMPLE), "-o", str(tmp_path / "file" / "x")], "file/x.partial: Not a directory; check that path, or give another"),
            (["evaluate", "nothing.ckpt", "nothing.h5", "-o", str(tmp_path / "file" / "x")], "file/x: Not a directory; check that path"),
            (["evaluate", str(trained / "model.pt"), str(trained / "packed"), "--energy-unit", "eV"], "to be read: --energy-unit does not apply"),
            (["export", str(trained / "model.pt"), str(tmp_path / "x.pt"), "--metrics", f"test={tmp_path / 'file'}"], "file is not the metrics.json"),
        ):
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 1
            assert isinstance(result.exception, SystemExit)
            assert message in result.output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["prepare", "nothing.h5", "-o", "x"], "no such file"),
            (["fit", "nothing.yaml"], "cannot be read"),
            (["evaluate", "nothing.ckpt", "nothing.h5"], "no such checkpoint"),
            (["evaluate", "nothing", "nothing.h5"], "no model 'nothing'"),
            (["export", "nothing.ckpt", "x.pt"], "no such checkpoint"),
        ],
    )
    def test_errors_are_one_line_without_a_traceback(self, arguments, message):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1
        assert message in result.output
        assert "Traceback" not in result.output
