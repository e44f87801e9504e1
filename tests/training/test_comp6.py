"""Errors on a folder in COMP6's layout: subsets, all pairs of conformers, and forces whose sign has to be found out."""

import itertools
import json

import h5py
import numpy as np
import pytest
from ase import units
from ase.data import chemical_symbols
from typer.testing import CliRunner

from openmm_se3.model_file import available_models
from tests.training.helpers import KEYS, SAMPLE
from training.__main__ import app
from training.comp6 import evaluate_folder, find_subsets, pair_difference_sums
from training.data.frames import DataError
from training.evaluate import evaluate, open_model

MODEL = available_models()[0]
N_FRAMES = 5
FORCES = {"s66x8": -1.0, "DrugBank": 1.0, "ANI-MD": None, "Tripeptides": "noise"}


def write_molecule(group, source, force_factor=1.0):
    """One molecule of the sample in the layout of COMP6."""
    group["species"] = np.array([chemical_symbols[z].encode() for z in source["atomic_numbers"][()]])
    group["coordinates"] = source["coordinates"][:N_FRAMES]
    group["energies"] = source[KEYS["energy_key"]][:N_FRAMES]
    group["smiles"] = np.array([b"C", b"O"])
    forces = source[KEYS["force_key"]][:N_FRAMES]
    if force_factor == "noise":
        group["forces"] = np.random.default_rng(0).normal(scale=0.05, size=forces.shape)
    elif force_factor is not None:
        group["forces"] = force_factor * forces


@pytest.fixture(scope="module")
def comp6(tmp_path_factory):
    """The shipped sample in COMP6's layout, once with gradients, once with forces, once without, once with noise for forces."""
    folder = tmp_path_factory.mktemp("COMP6v1")
    with h5py.File(SAMPLE) as sample:
        names = iter(sample)
        for subset, factor in FORCES.items():
            (folder / subset).mkdir()
            with h5py.File(folder / subset / f"{subset}_test.h5", "w") as file:
                for name in itertools.islice(names, 2):
                    write_molecule(file.create_group(f"{subset}/{subset}-{name}"), sample[name], factor)
    return folder


@pytest.fixture(scope="module")
def metrics(comp6, tmp_path_factory):
    output = tmp_path_factory.mktemp("metrics") / "comp6"
    found = evaluate_folder(MODEL, comp6, output)
    assert json.loads((output / "metrics.json").read_text()) == found
    with pytest.raises(FileExistsError, match="holds metrics already"):
        evaluate_folder(MODEL, comp6, output)
    return found


def test_pairs_are_counted_in_closed_form():
    errors = np.random.default_rng(0).normal(size=23) - 1e4
    differences = np.array([a - b for a, b in itertools.combinations(errors, 2)])
    n, absolute, square = pair_difference_sums(errors)
    assert n == len(differences)
    assert absolute == pytest.approx(np.abs(differences).sum(), rel=1e-9)
    assert square == pytest.approx(np.square(differences).sum(), rel=1e-9)
    assert pair_difference_sums(np.array([3.0])) == (0, 0.0, 0.0)


def test_sign_of_the_forces_is_found_and_reported(metrics):
    verdicts = {name: next(iter(s["files"].values())) for name, s in metrics["subsets"].items()}
    assert {n: v["force_labels"] for n, v in verdicts.items()} == {
        "s66x8": "gradients",
        "DrugBank": "forces",
        "ANI-MD": "none",
        "Tripeptides": "undetermined",
    }
    assert verdicts["s66x8"]["force_label_correlation"] < -0.9
    assert verdicts["DrugBank"]["force_label_slope"] == pytest.approx(1.0, abs=0.2)
    notes = "\n".join(metrics["notes"])
    assert "s66x8/s66x8_test.h5: its 'forces' are gradients" in notes
    assert "ANI-MD/ANI-MD_test.h5: no forces" in notes
    assert "under neither sign" in notes
    for name, subset in metrics["subsets"].items():
        assert ("force_rmse_mev_per_angstrom" in subset) == (name in ("s66x8", "DrugBank"))


def test_errors_are_those_of_evaluate_on_the_same_frames(comp6, metrics, tmp_path):
    """The same molecules through the ANI-1x layout and the packed data set."""
    with h5py.File(tmp_path / "same.h5", "w") as file, h5py.File(SAMPLE) as sample:
        for name in list(sample)[:2]:
            group = file.create_group(name)
            group["atomic_numbers"] = sample[name]["atomic_numbers"][()]
            for key in ("coordinates", *KEYS.values()):
                group[key] = sample[name][key][:N_FRAMES]
    expected = evaluate(MODEL, tmp_path / "same.h5", **KEYS)
    got = metrics["subsets"]["s66x8"]
    assert got["n_frames"] == expected["n_frames"] == 2 * N_FRAMES
    assert got["n_molecules"] == 2
    for key in ("energy_mae", "energy_rmse", "energy_per_atom_rmse"):
        assert got[f"{key}_kcal_per_mol"] == pytest.approx(expected[f"{key}_kcal_per_mol"], rel=1e-4)
    for key in ("force_mae", "force_rmse", "conservative_force_rmse"):
        assert got[f"{key}_kcal_per_mol_per_angstrom"] == pytest.approx(expected[f"{key}_kcal_per_mol_per_angstrom"], rel=1e-4)


def test_conformer_differences_do_not_see_a_shift_of_the_reference(comp6, metrics):
    aligned = evaluate_folder(MODEL, comp6, align_energies=True, conservative=False)
    for name, subset in metrics["subsets"].items():
        key = "conformer_energy_difference_rmse_kcal_per_mol"
        assert aligned["subsets"][name][key] == pytest.approx(subset[key], rel=1e-3)
    assert aligned["all"]["energy_rmse_kcal_per_mol"] < metrics["all"]["energy_rmse_kcal_per_mol"]
    assert metrics["all"]["n_frames"] == sum(s["n_frames"] for s in metrics["subsets"].values()) == 8 * N_FRAMES


def test_all_is_the_pool_of_the_subsets(metrics):
    squares = sum(s["energy_rmse_mev"] ** 2 * s["n_frames"] for s in metrics["subsets"].values())
    assert metrics["all"]["energy_rmse_mev"] == pytest.approx((squares / metrics["all"]["n_frames"]) ** 0.5, rel=1e-9)


def test_wrong_unit_of_forces_is_pointed_out(tmp_path):
    with h5py.File(tmp_path / "bohr.h5", "w") as file, h5py.File(SAMPLE) as sample:
        write_molecule(file.create_group("set/molecule"), sample["C1H4"], units.Bohr)
    found = evaluate_folder(MODEL, tmp_path, conservative=False)
    assert list(found["subsets"]) == ["bohr"]
    assert "is their unit Hartree/Angstrom?" in found["notes"][0]


class TestRefusals:
    def test_folder_without_files(self, tmp_path):
        with pytest.raises(DataError, match=r"neither a packed data set .* nor a folder with HDF5 files"):
            find_subsets(tmp_path)

    def test_element_that_the_model_does_not_know(self, tmp_path):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            group = file.create_group("set/salt")
            group["species"] = np.array([b"Cl", b"H"])
            group["coordinates"] = np.array([[[0, 0, 0], [1.3, 0, 0]]], dtype=np.float32)
            group["energies"] = np.array([-460.0])
        with pytest.raises(DataError, match=rf"/set/salt holds Cl, which {MODEL} does not know; it knows H, C, N, O"):
            evaluate_folder(MODEL, tmp_path)

    def test_element_without_a_self_energy(self, comp6, monkeypatch):
        evaluator = open_model(MODEL)
        del evaluator.self_energies["H"]
        monkeypatch.setattr("training.comp6.open_model", lambda name: evaluator)
        with pytest.raises(DataError, match=rf"{MODEL} has no self-energy of H"):
            evaluate_folder(MODEL, comp6 / "DrugBank", conservative=False)
        evaluate_folder(MODEL, comp6 / "DrugBank", conservative=False, align_energies=True)

    def test_split_of_a_folder(self, comp6):
        result = CliRunner().invoke(app, ["evaluate", MODEL, str(comp6), "--split", "test"])
        assert result.exit_code == 1
        assert "--split, --max-frames and --predictions do not apply" in " ".join(result.output.split())

    def test_how_to_read_a_folder(self, comp6):
        options = [
            "--layout",
            "ani1",
            "--energy-unit",
            "eV",
            "--force-unit",
            "eV/Angstrom",
            "--energy-key",
            "a",
            "--force-key",
            "b",
            "--energies-only",
        ]
        result = CliRunner().invoke(app, ["evaluate", MODEL, str(comp6), *options])
        assert result.exit_code == 1
        refused = ", ".join(option for option in options if option.startswith("--"))
        assert {*refused.split(", ")} == {*result.output.partition("is to be read: ")[2].partition(" does not apply")[0].split(", ")}


def test_command_line(comp6):
    result = CliRunner().invoke(app, ["evaluate", MODEL, str(comp6 / "s66x8"), "--no-conservative"])
    assert result.exit_code == 0, result.output
    assert "MAE / RMSE in kcal/mol and kcal/mol/Å" in result.output
    assert json.loads(result.stdout)["all"]["n_molecules"] == 2


def test_the_size_of_a_batch_does_not_matter(comp6, metrics, monkeypatch):
    monkeypatch.setattr("training.comp6._BATCH_EDGES", 100)
    small = evaluate_folder(MODEL, comp6 / "DrugBank", conservative=False)
    assert small["all"]["force_rmse_mev_per_angstrom"] == pytest.approx(metrics["subsets"]["DrugBank"]["force_rmse_mev_per_angstrom"], rel=1e-5)
