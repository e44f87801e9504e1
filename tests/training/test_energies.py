"""What energies are relative to while a network is trained, and whether it can learn them: self-energies, shift, scale, start model."""

import json

import h5py
import numpy as np
import pytest
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL

from benchmarks.clusters import NUMBERS
from openmm_se3.model_file import read_metadata
from tests.training.helpers import BINDING, KEYS, SAMPLE, free_atoms, sample_dataset, small_config
from training.align import ModelReference
from training.checkpoint import load_checkpoint
from training.config import ConfigError
from training.data.frames import DataError
from training.data.packed import LEAST_ENERGY_SPREAD
from training.data.prepare import prepare
from training.evaluate import evaluate
from training.export import _read, _training_data, export
from training.fit import fit
from training.module import TrainingModule


def part_of_the_sample(path, elements, n_frames=16):
    """The molecules of the sample that some elements make."""
    with h5py.File(SAMPLE) as sample, h5py.File(path, "w") as part:
        for formula in sample:
            numbers = sample[formula]["atomic_numbers"][()]
            if set(numbers.tolist()) <= {NUMBER_OF_SYMBOL[s] for s in elements}:
                group = part.create_group(formula)
                group["atomic_numbers"] = numbers
                for key in ("coordinates", *KEYS.values()):
                    group[key] = sample[formula][key][:n_frames]
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A short run on the whole sample."""
    directory = tmp_path_factory.mktemp("start")
    fit(small_config(sample_dataset(directory).directory, max_steps=2), directory / "run", accelerator="cpu")
    return directory / "run" / "last.ckpt"


class TestShift:
    @pytest.mark.parametrize("processes", [1, 2, 5])
    def test_each_process_has_something_to_validate(self, tmp_path, processes):
        """Lightning ends a run in which one of them has not."""
        dataset = sample_dataset(tmp_path)
        module = TrainingModule(small_config(dataset.directory, batch_molecules=1000), dataset)
        batches = module.sampler("validation", processes).epoch(0, shuffle=False)
        assert len(batches) >= processes
        assert sorted(np.concatenate(batches)) == sorted(dataset.indices("validation"))
        with pytest.raises(DataError, match="fewer than the 1000 processes"):
            module.sampler("validation", 1000)

    def test_fitted_self_energies_leave_nothing_to_shift(self, tmp_path):
        dataset = sample_dataset(tmp_path)
        module = TrainingModule(small_config(dataset.directory), dataset)
        rms = dataset.metadata["statistics"]["residual_per_sqrt_atom"]["rms"]
        assert not module.network.energy_shift.any()
        assert module.loss.energy_scale == rms
        assert float(module.network.energy_scale) == pytest.approx(rms)

    def test_the_binding_of_free_atoms_is_in_the_shift_not_in_the_scale(self, tmp_path):
        dataset = sample_dataset(tmp_path, self_energies=str(free_atoms(tmp_path)))
        module = TrainingModule(small_config(dataset.directory), dataset)
        # By hand: least squares frame by frame over the training split, and what it leaves.
        frames = dataset.indices("train")
        atoms = [dataset.numbers[dataset.offsets[f] : dataset.offsets[f + 1]] for f in frames]
        counts = np.array([[(a == z).sum() for z in NUMBERS] for a in atoms], dtype=float)
        residuals = np.array([dataset.energies[f] - dataset.self_energies()[a].sum() for f, a in zip(frames, atoms, strict=True)])
        expected = np.linalg.lstsq(counts, residuals, rcond=None)[0]
        np.testing.assert_allclose(module.network.energy_shift, expected, rtol=1e-5)
        np.testing.assert_allclose(expected, [-BINDING[s] for s in "HCNO"], atol=0.5)
        spread = np.sqrt(np.mean((residuals - counts @ expected) ** 2 / counts.sum(1)))
        assert module.loss.energy_scale == pytest.approx(spread, rel=1e-6)
        assert spread < 0.1 * dataset.metadata["statistics"]["residual_per_sqrt_atom"]["rms"]

    def test_energies_against_free_atoms_are_learned(self, tmp_path):
        """Within a few steps, errors come below those of a network that knows compositions alone would have had to start from."""
        dataset = sample_dataset(tmp_path, self_energies=str(free_atoms(tmp_path)))
        module = fit(small_config(dataset.directory), tmp_path / "run", accelerator="cpu")
        assert module.validation_errors["energy_per_atom_rmse"] < 0.3  # before, the binding itself: some 3 eV

    def test_the_loss_has_the_scale_of_the_shift_that_the_weights_brought(self, tmp_path):
        """A run that an earlier version began, without a shift, goes on with the loss it had."""
        dataset = sample_dataset(tmp_path, self_energies=str(free_atoms(tmp_path)))
        module = TrainingModule(small_config(dataset.directory), dataset)
        module.network.energy_shift.zero_()
        module.on_fit_start()
        assert module.loss.energy_scale == dataset.metadata["statistics"]["residual_per_sqrt_atom"]["rms"]

    def test_as_many_frames_as_compositions(self, tmp_path):
        """Their energies are fitted exactly; forces still train."""
        path = part_of_the_sample(tmp_path / "two.h5", "CH", n_frames=1)
        with h5py.File(path, "r+") as file:
            del file["C3H8"]
        dataset = prepare([path], tmp_path / "packed", validation=0.0, **KEYS)
        assert dataset.metadata["statistics"]["residual_per_sqrt_atom"]["rms"] < 1e-6
        module = fit(small_config(dataset.directory), tmp_path / "run", accelerator="cpu")
        assert float(module.network.energy_scale) == pytest.approx(LEAST_ENERGY_SPREAD)
        assert not module.bad_batches
        assert module.latest["force_rmse"] < 100


class TestStartModel:
    def test_energies_far_from_the_labels_are_refused(self, tmp_path, start):
        dataset = sample_dataset(tmp_path, self_energies=str(free_atoms(tmp_path)))
        config = small_config(dataset.directory, max_steps=1).model_copy(update={"initial_model": str(start)})
        with pytest.raises(ConfigError, match=r"differ from those of .*packed by \+[34]\.\d+ eV per atom .*--align-to .*last.ckpt"):
            fit(config, tmp_path / "run", accelerator="cpu")
        aligned = prepare([SAMPLE], tmp_path / "aligned", align_to=ModelReference(str(start)), validation=0.2, **KEYS)
        fit(config.model_copy(update={"data": str(aligned.directory)}), tmp_path / "run", accelerator="cpu")

    def test_self_energies_of_elements_that_the_data_lack_are_kept(self, tmp_path, start):
        path = part_of_the_sample(tmp_path / "part.h5", "CH")
        dataset = prepare([path], tmp_path / "packed", validation=0.34, split_by="frame", **KEYS)
        config = small_config(dataset.directory, max_steps=2)
        tuned = config.model_copy(update={"initial_model": str(start)})
        fit(tuned, tmp_path / "tuned", accelerator="cpu")
        before, after = (load_checkpoint(p).data["self_energies"] for p in (start, tmp_path / "tuned" / "last.ckpt"))
        assert {s: after[s] for s in "NO"} == {s: before[s] for s in "NO"}
        assert {s: after[s] for s in "CH"} == dataset.metadata["self_energies"]
        evaluate(str(tmp_path / "tuned" / "last.ckpt"), SAMPLE, conservative=False, **KEYS)
        export(tmp_path / "tuned" / "last.ckpt", tmp_path / "tuned.pt")
        metadata = read_metadata(tmp_path / "tuned.pt")
        assert set(metadata.self_energies) == set("HCNO")
        assert metadata.training_data["initial_model"] == "last"
        assert _training_data(_read(tmp_path / "tuned.pt"))["initial_model"] == "last"  # when it is exported again, too

    def test_elements_without_a_self_energy_are_named(self, tmp_path):
        path = part_of_the_sample(tmp_path / "part.h5", "CH")
        dataset = prepare([path], tmp_path / "packed", validation=0.34, split_by="frame", **KEYS)
        fit(small_config(dataset.directory, max_steps=2), tmp_path / "run", accelerator="cpu")
        model = str(tmp_path / "run" / "last.ckpt")
        evaluate(model, path, conservative=False, **KEYS)
        with pytest.raises(DataError, match="last has no self-energy of N, O"):
            evaluate(model, SAMPLE, conservative=False, **KEYS)
        evaluate(model, SAMPLE, conservative=False, align_energies=True, **KEYS)
        with pytest.raises(DataError, match="last has no self-energy of N, O"):
            prepare([SAMPLE], tmp_path / "aligned", align_to=ModelReference(model), **KEYS)

    def test_the_whole_table_is_packed(self, tmp_path):
        table = free_atoms(tmp_path)
        dataset = prepare([part_of_the_sample(tmp_path / "part.h5", "CH")], tmp_path / "packed", self_energies=str(table), **KEYS)
        assert dataset.metadata["elements"] == ["H", "C"]
        assert {"unit": "eV"} | dataset.metadata["self_energies"] == json.loads(table.read_text())
