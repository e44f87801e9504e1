"""Labels of two levels of theory come to one scale, and what molecules differ in is left alone."""

import h5py
import numpy as np
import pytest
import torch

from tests.training.helpers import KEYS, NUMBERS, SAMPLE, sample_dataset
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


def shifted_copy(path):
    """The sample with other total energies, as another level of theory has them."""
    with h5py.File(SAMPLE) as sample, h5py.File(path, "w") as copy:
        for name in sample:
            sample.copy(name, copy)
            numbers = sample[name]["atomic_numbers"][()]
            copy[name][KEYS["energy_key"]][...] += sum(SHIFT[int(z)] for z in numbers) / energy_factor("Hartree")


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


def test_refusals(tmp_path, reference):
    with pytest.raises(DataError, match="self_energies must be auto, got 'least-squares'"):
        prepare([SAMPLE], tmp_path / "packed", align_to=reference, self_energies="least-squares")
    reference._evaluator.atomic_numbers = (1, 6)
    with pytest.raises(DataError, match="hold N, O, which plain does not know"):
        prepare([SAMPLE], tmp_path / "packed", align_to=reference)
    assert not (tmp_path / "packed").exists()
