"""Tables and learning curves from runs."""

import csv
import json
import shutil

import pytest
from typer.testing import CliRunner

from tests.training.helpers import sample_dataset, small_config
from training.__main__ import app
from training.callbacks import COLUMNS, read_log
from training.checkpoint import CheckpointError
from training.config import LossConfig
from training.evaluate import evaluate
from training.figures import PRINTED, error_table, figures, read_run
from training.fit import fit
from training.sweep import last_validation
from training.units import KCAL_PER_MOL_PER_EV


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps."""
    directory = tmp_path_factory.mktemp("runs")
    dataset = sample_dataset(directory)
    fit(small_config(dataset.directory, max_steps=4, validate_every=2), directory / "small", accelerator="cpu")
    return directory / "small", dataset


def write_log(run, rows):
    with open(run / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def test_tables_and_pictures(trained, tmp_path):
    run, dataset = trained
    made = figures([run], tmp_path)
    assert {p.name for p in made} == {"table_3_1.md", "table_3_1.json", "table_3_2.md", "table_3_2.json", "small-energy.png", "small-force.png"}
    assert all(p.stat().st_size > 0 for p in made)
    (row,) = json.loads((tmp_path / "table_3_1.json").read_text())["rows"]
    statistics = dataset.metadata["statistics"]
    assert row["total, mean"] == pytest.approx(statistics["total"]["mean"] * KCAL_PER_MOL_PER_EV)
    assert row["without self-energies, std"] == pytest.approx(statistics["residual"]["std"] * KCAL_PER_MOL_PER_EV)
    table = json.loads((tmp_path / "table_3_2.json").read_text())
    assert [r["run"] for r in table["rows"]] == ["small", *(p["run"] for p in PRINTED)]
    assert table["rows"][0]["steps"] == 4
    assert table["rows"][1]["energy, training"] == 3.211
    assert "energy, validation" not in table["rows"][1]  # the thesis held nothing out
    assert "not comparable as they stand" in (tmp_path / "table_3_2.md").read_text()


def test_best_validation_is_told_by_forces_and_training_is_averaged(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "made-up")
    train = [{"step": s, "train_energy_rmse": s, "train_force_rmse": 2 * s} for s in range(1, 41)]
    validation = [
        {"step": 10, "validation_energy_rmse": 1.0, "validation_force_rmse": 9.0},
        {"step": 20, "validation_energy_rmse": 3.0, "validation_force_rmse": 5.0},
        {"step": 30, "validation_energy_rmse": 2.0, "validation_force_rmse": 7.0},
    ]
    write_log(run, train + validation)
    row = error_table([read_run(run)])[0]
    assert row["best at step"] == 20
    assert row["energy, validation"] == 3.0
    assert row["force, validation"] == 5.0
    assert row["energy, training"] == pytest.approx(30.5)  # the last 20 rows: 21 to 40
    assert row["force, training"] == pytest.approx(61.0)


def test_run_of_energies_alone(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "energies")
    write_log(run, [{"step": 5, "train_energy_rmse": 2.0}, {"step": 5, "validation_energy_rmse": 1.5}])
    made = figures([run], tmp_path / "out")
    assert "energies-force.png" not in {p.name for p in made}
    row = error_table([read_run(run)])[0]
    assert (row["best at step"], row["energy, validation"], row["force, validation"], row["force, training"]) == (5, 1.5, None, None)


def test_run_on_energies_of_data_with_forces(tmp_path):
    """Where forces have no weight, their errors neither choose the weights nor stand in the table."""
    config = small_config(sample_dataset(tmp_path).directory, max_steps=2, validate_every=2)
    config = config.model_copy(update={"loss": LossConfig(energy_weight=1.0, force_weight=0.0)})
    module = fit(config, tmp_path / "energies", accelerator="cpu")
    assert float(module.trainer.callback_metrics["validation_error"]) == pytest.approx(module.validation_errors["energy_rmse"])
    row = error_table([read_run(tmp_path / "energies")])[0]
    assert row["best at step"] == 2
    assert [key for key in row if "force" in key] == []
    assert {p.name for p in figures([tmp_path / "energies"], tmp_path / "out") if p.suffix == ".png"} == {"energies-energy.png"}


@pytest.fixture(scope="module")
def conservative(tmp_path_factory):
    """A run on conservative forces alone, of data split by frame, whose direct forces are those of random weights."""
    directory = tmp_path_factory.mktemp("conservative")
    dataset = sample_dataset(directory, split_by="frame")
    config = small_config(dataset.directory, max_steps=2, validate_every=2)
    config = config.model_copy(update={"loss": LossConfig(energy_weight=0.1, force_weight=0.0, conservative_weight=1.0)})
    fit(config, directory / "run", accelerator="cpu")
    return directory / "run", dataset


def test_run_on_conservative_forces_alone(conservative, tmp_path):
    run, _ = conservative
    made = figures([run], tmp_path)
    assert "run-force.png" in {p.name for p in made}
    row = error_table([read_run(run)])[0]
    assert [key for key in row if "force" in key] == ["conservative force, validation", "conservative force, training"]
    (expected,) = [float(r["validation_conservative_force_rmse"]) for r in read_log(run / "log.csv") if r["validation_energy_rmse"]]
    assert row["conservative force, validation"] == expected
    assert "validation_force_rmse" not in last_validation(run / "log.csv", read_run(run).config.loss)
    assert last_validation(run / "log.csv", read_run(run).config.loss)["validation_conservative_force_rmse"] == expected


def test_the_caption_tells_how_data_were_split(trained, conservative, tmp_path):
    for runs, held_out in ([trained[0]], "formulas"), ([conservative[0]], "frames"), ([trained[0], conservative[0]], "formulas or frames"):
        figures(runs, tmp_path / held_out)
        assert f"on the validation split, {held_out} held out from training," in (tmp_path / held_out / "table_3_2.md").read_text()


def test_parity_of_conservative_forces_alone(conservative, tmp_path, monkeypatch):
    run, dataset = conservative
    drawn = {}
    monkeypatch.setattr("training.evaluate.plot_parity", lambda labels, predictions, forces, picture: drawn.update(forces))
    metrics = evaluate(str(run / "last.ckpt"), dataset.directory, split="validation", output=tmp_path / "out")
    assert metrics["untrained"] == ["direct"]
    assert list(drawn) == ["conservative"]
    labels, predictions = drawn["conservative"] * KCAL_PER_MOL_PER_EV
    rmse = ((labels - predictions) ** 2).mean() ** 0.5
    assert metrics["conservative_force_rmse_kcal_per_mol_per_angstrom"] == pytest.approx(rmse, rel=1e-4)


@pytest.mark.parametrize("folder", ["training", "benchmarks"])
def test_no_picture_changes_the_backend_of_a_notebook(folder, request):
    for path in (request.config.rootpath / folder).rglob("*.py"):
        assert "pyplot" not in path.read_text(), path


def test_refusals(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"lacks config\.yaml, log\.csv, last\.ckpt"):
        figures([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(ValueError, match="of different names, got small, small"):
        figures([trained[0], trained[0]], tmp_path / "out")
    result = CliRunner().invoke(app, ["figures", str(tmp_path / "empty"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "is no directory of 'python -m training fit'" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
