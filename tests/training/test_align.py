"""Labels of two levels of theory come to one scale, and what molecules differ in is left alone."""

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.clusters import NUMBERS
from tests.training.helpers import KEYS, SAMPLE, sample_dataset
from training.__main__ import app
from training.align import ModelReference
from training.data.frames import DataError
from training.data.prepare import prepare
from training.evaluate import Evaluator
from training.units import energy_factor

SELF_ENERGIES = {"H": -16.0, "C": -1036.0, "N": -1488.0, "O": -2046.0}
#: How the second file differs from the first, eV per element.
SHIFT = {1: 0.3, 6: -2.0, 7: 1.5, 8: 4.0}


@pytest.fixture
def reference(monkeypatch):
    """A model whose energies are the self-energies alone."""

    def run(batch, conservative):
        return torch.zeros(len(batch.n_atoms_of), dtype=torch.float64), torch.zeros_like(batch.positions), None

    monkeypatch.setattr("training.align.open_model", lambda name: Evaluator(NUMBERS, 4.0, SELF_ENERGIES, run, name))
    return ModelReference("plain")


def shifted_copy(path, level=None, part=slice(None), shift=SHIFT):
    """Every group, or some, of the sample with other total energies, as another level of theory has them."""
    with h5py.File(SAMPLE) as sample, h5py.File(path, "w") as copy:
        for name in list(sample)[part]:
            sample.copy(name, copy)
            numbers = sample[name]["atomic_numbers"][()]
            copy[name][KEYS["energy_key"]][...] += sum(shift[int(z)] for z in numbers) / energy_factor("Hartree")
        if level is not None:
            copy.attrs["level_of_theory"] = level
    return path


def test_the_second_file_comes_to_the_level_of_the_first(tmp_path, reference):
    shifted_copy(tmp_path / "other.h5")
    dataset = prepare([SAMPLE, tmp_path / "other.h5"], tmp_path / "packed", align_to=reference)
    n = len(dataset) // 2
    np.testing.assert_allclose(dataset.energies[n:], dataset.energies[:n], atol=1e-6)
    np.testing.assert_allclose(dataset.energies[:n], sample_dataset(tmp_path / "plain").energies)
    first, second = dataset.metadata["level_shifts"]
    difference = {s: second["per_element_ev"][s] - first["per_element_ev"][s] for s in first["per_element_ev"]}
    assert difference == pytest.approx({"H": 0.3, "C": -2.0, "N": 1.5, "O": 4.0}, abs=1e-6)
    # What the model's energies are relative to, at the level of the first file.
    expected = {s: SELF_ENERGIES[s] + first["per_element_ev"][s] for s in SELF_ENERGIES}
    assert dataset.metadata["self_energies"] == pytest.approx(expected, abs=1e-9)
    assert second["rms_per_atom_ev"]["after"] == pytest.approx(first["rms_per_atom_ev"]["after"], abs=1e-6)
    assert second["rms_per_atom_ev"]["after"] < 0.2 < second["rms_per_atom_ev"]["before"]


def test_elements_that_no_sampled_frame_has(tmp_path, reference, monkeypatch):
    monkeypatch.setattr("training.align.SAMPLE", 1)
    dataset = prepare([SAMPLE, shifted_copy(tmp_path / "other.h5")], tmp_path / "packed", align_to=reference)
    assert all(set(level["per_element_ev"]) == {"H", "C", "N", "O"} for level in dataset.metadata["level_shifts"])


NOTHING = dict.fromkeys(SHIFT, 0.0)


def test_files_of_one_level_share_a_shift(tmp_path, reference):
    """A fit for each would also take away by how much the model errs on the molecules of each."""
    parts = [shifted_copy(tmp_path / f"{i}.h5", "DFT", slice(i, None, 2), NOTHING) for i in (0, 1)]
    dataset = prepare(parts, tmp_path / "packed", align_to=reference)
    apart = prepare(parts, tmp_path / "apart", self_energies="least-squares")
    assert np.array_equal(dataset.energies, apart.energies)  # as labelled: what the files differ in is what their molecules differ in
    (level,) = dataset.metadata["level_shifts"]
    assert (level["source"], level["level_of_theory"]) == ("0.h5, 1.h5", "DFT")
    unnamed = [shifted_copy(tmp_path / f"unnamed-{i}.h5", None, slice(i, None, 2), NOTHING) for i in (0, 1)]
    assert len(prepare(unnamed, tmp_path / "unnamed", align_to=reference).metadata["level_shifts"]) == 2


@pytest.mark.parametrize("level", ["DFT", None, "CCSD(T)"])
def test_files_that_are_held_out_are_not_fitted(tmp_path, reference, level):
    first = shifted_copy(tmp_path / "first.h5", "HF", slice(1, None, 2), NOTHING)
    second = shifted_copy(tmp_path / "second.h5", "DFT", slice(1, None, 2))
    other = shifted_copy(tmp_path / "test.h5", level, slice(0, None, 2), {1: 1.0, 6: 0.0, 7: 0.0, 8: 0.0})
    dataset = prepare([first, second], tmp_path / "packed", align_to=reference, test_data=[other], validation=0.0)
    taken = {s["source"]: s["taken_for"] for s in dataset.metadata["level_shifts"]}
    with_second = level == "DFT"
    assert taken == {"first.h5": [] if with_second else ["test.h5"], "second.h5": ["test.h5"] if with_second else []}
    labels = prepare([other], tmp_path / "labels", self_energies="least-squares", validation=0.0)
    expected = labels.energies.copy()
    if with_second:
        expected -= [sum(SHIFT[int(z)] for z in labels.numbers[a:b]) for a, b in zip(labels.offsets[:-1], labels.offsets[1:], strict=True)]
    np.testing.assert_allclose(dataset.energies[dataset.indices("test")], expected, atol=1e-6)


def test_what_was_taken_is_told(tmp_path, reference, monkeypatch):
    monkeypatch.setattr("training.align.ModelReference", lambda name: reference)
    files = [shifted_copy(tmp_path / f"{i}.h5", "DFT", slice(i, None, 3), NOTHING) for i in (0, 1, 2)]
    options = [str(files[0]), str(files[1]), "--test-data", str(files[2]), "-o", str(tmp_path / "packed"), "--align-to", "plain"]
    result = CliRunner().invoke(app, ["prepare", *options])
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "0.h5, 1.h5 (DFT) against plain in eV: H " in told
    assert "kcal/mol; taken for 2.h5 too" in told


def test_elements_of_held_out_files_that_the_training_files_of_their_level_lack(tmp_path, reference):
    def hold(path, level, elements):
        path = shifted_copy(path, level)
        with h5py.File(path, "a") as file:
            for name in [n for n in file if set(file[n]["atomic_numbers"][()]) - elements]:
                del file[name]
        return path

    first = hold(tmp_path / "first.h5", "HF", {1, 6, 7, 8})
    second = hold(tmp_path / "second.h5", "DFT", {1, 6, 8})
    test = hold(tmp_path / "test.h5", "DFT", {1, 6, 7, 8})
    with pytest.raises(DataError, match="a file that is held out has N, which the training files of its level of theory lack"):
        prepare([first, second], tmp_path / "packed", align_to=reference, test_data=[test], validation=0.0)
    assert not (tmp_path / "packed").exists()


def test_refusals(tmp_path, reference):
    with pytest.raises(DataError, match="self_energies must be auto, got 'least-squares'"):
        prepare([SAMPLE], tmp_path / "packed", align_to=reference, self_energies="least-squares")
    reference._evaluator.atomic_numbers = (1, 6)
    with pytest.raises(DataError, match="hold N, O, which plain does not know"):
        prepare([SAMPLE], tmp_path / "packed", align_to=reference)
    assert not (tmp_path / "packed").exists()
