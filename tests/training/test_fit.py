"""Training: it learns, it survives a kill and a full disk, it notices what is not finite, it refuses bad configurations."""

import dataclasses
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from ase.io import write
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator
from torch._inductor.exc import InductorError, InvalidCxxCompiler
from typer.testing import CliRunner

from benchmarks.clusters import NUMBERS
from tests.training.helpers import KEYS, SAMPLE, distorted_waters, free_atoms, sample_dataset, small_config, small_network
from training.__main__ import app
from training.ablate import ablate, read_ablation
from training.callbacks import read_log
from training.checkpoint import CheckpointError, SafeCheckpointIO, initial_weights, load_checkpoint, weights_alone
from training.config import ConfigError, LossConfig, OptimizerConfig, parse_config, read_config
from training.data.batches import Batch, Collator, assemble
from training.data.frames import DataError
from training.data.prepare import prepare
from training.export import export
from training.fit import fit
from training.force_matching import backward_force_matching, positions_only
from training.guard import NonFiniteTraining
from training.loss import EnergyForceLoss, huber, predict
from training.module import TrainingModule
from training.network import NetworkConfig, ReferenceConfig, build_network
from training.run import TrainingStopped
from training.sweep import sweep

ROOT = Path(__file__).parent.parent.parent


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "last.ckpt", weights_only=True)["state_dict"]


def test_run_leaves_everything(tmp_path):
    dataset = sample_dataset(tmp_path)
    fit(small_config(dataset.directory), tmp_path / "run", accelerator="cpu")
    for name in ("last.ckpt", "best.ckpt", "log.csv", "learning_curves.png", "config.yaml"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    rows = read_log(tmp_path / "run" / "log.csv")
    assert [int(r["step"]) for r in rows if r["validation_energy_rmse"]] == [4, 6]  # every four, and the last
    assert [int(r["step"]) for r in rows if r["loss"]] == [1, 2, 3, 4, 5, 6]
    assert any(r["validation_force_rmse"] for r in rows)
    loaded = load_checkpoint(tmp_path / "run" / "last.ckpt")
    assert loaded.step == 6
    with pytest.raises(FileExistsError, match="not empty"):
        fit(small_config(dataset.directory), tmp_path / "run")


def test_a_run_shorter_than_its_first_validation_is_validated_at_its_end(tmp_path):
    for name, validation in (("with", 0.2), ("without", 0.0)):
        dataset = sample_dataset(tmp_path / name, validation=validation)
        config = small_config(dataset.directory, max_steps=2, validate_every=1000)
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        result = CliRunner().invoke(app, ["fit", str(tmp_path / name / "config.yaml"), "-o", str(tmp_path / name / "run"), "--accelerator", "cpu"])
        assert result.exit_code == 0, result.output
        written = ["last.ckpt", "best.ckpt", "log.csv", "learning_curves.png"] if validation else ["last.ckpt", "log.csv"]
        assert all((tmp_path / name / "run" / file).exists() for file in written)
        assert result.output.endswith(f"run: {', '.join(written)}\n")


class TestStart:
    def test_an_apple_gpu_is_not_chosen_and_nothing_is_set_for_good(self, tmp_path, monkeypatch):
        """It has no float64; and what `fit` keeps Lightning from saying, other code of the process may still hear."""
        monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
        logger, dataset = logging.getLogger("lightning.pytorch"), sample_dataset(tmp_path)
        before = logger.level, list(warnings.filters)
        module = fit(small_config(dataset.directory, max_steps=1), tmp_path / "run")
        assert isinstance(module.trainer.accelerator, CPUAccelerator | CUDAAccelerator)
        assert (logger.level, warnings.filters) == before

    def test_a_start_that_failed_leaves_room_for_the_next(self, tmp_path, monkeypatch):
        dataset = sample_dataset(tmp_path)
        config = small_config(dataset.directory)
        with monkeypatch.context() as patch:
            patch.setattr(TrainingModule, "training_step", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                fit(config, tmp_path / "run", accelerator="cpu")
        corrected = small_config(dataset.directory, batch_molecules=4, max_steps=1)
        fit(corrected, tmp_path / "run", accelerator="cpu")
        assert read_config(tmp_path / "run" / "config.yaml") == corrected
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "thesis.tex").touch()
        with pytest.raises(FileExistsError, match="is not empty"):
            fit(config, tmp_path / "other", accelerator="cpu")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["-o", "{}/file"], "file is a file; give a directory"),
            (["-o", "{}/file/x"], "file/x: Not a directory; check that path"),
            (["-o", "{}/run", "--devices", "0"], "cannot train with accelerator cpu, devices 0"),
            (["-o", "{}/run", "--devices", "-1"], "cannot train with accelerator cpu, devices -1"),
            (["-o", "{}/run", "--accelerator", "gpu"], "cannot train with accelerator gpu, devices 1"),
        ],
    )
    def test_refusals_leave_nothing(self, tmp_path, monkeypatch, arguments, message):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        dataset = sample_dataset(tmp_path)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(small_config(dataset.directory).model_dump(mode="json")))
        (tmp_path / "file").touch()
        filled = [a.format(tmp_path) for a in arguments]
        result = CliRunner().invoke(app, ["fit", str(tmp_path / "config.yaml"), "--accelerator", "cpu", *filled])
        assert result.exit_code == 1
        assert message in result.output
        assert isinstance(result.exception, SystemExit)  # no traceback
        assert not (tmp_path / "run").exists()


def test_weights_alone_are_enough_to_evaluate_and_go_on(tmp_path):
    dataset = sample_dataset(tmp_path)
    fit(small_config(dataset.directory), tmp_path / "run", accelerator="cpu")
    weights_alone(tmp_path / "run" / "last.ckpt", tmp_path / "alone.ckpt")
    whole, alone = load_checkpoint(tmp_path / "run" / "last.ckpt"), load_checkpoint(tmp_path / "alone.ckpt")
    assert (alone.data, alone.step) == (whole.data, whole.step)
    start = initial_weights(str(tmp_path / "alone.ckpt"), alone.config.network)
    assert all(torch.equal(start[name], value) for name, value in whole.network.state_dict().items())
    assert str(tmp_path).encode() not in (tmp_path / "alone.ckpt").read_bytes()  # nobody else has these folders
    assert (tmp_path / "alone.ckpt").stat().st_size < 0.6 * (tmp_path / "run" / "last.ckpt").stat().st_size
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        weights_alone(dataset.directory / "metadata.json", tmp_path / "none.ckpt")


@pytest.mark.parametrize("loss", [{"conservative_weight": 0.0}, {"conservative_weight": 1.0}, {"energy_weight": 1.0, "force_weight": 0.0}])
def test_a_handful_of_molecules_can_be_learned(tmp_path, loss):
    """Eight frames, every batch the same: each term of the loss falls to a fraction."""
    with h5py.File(SAMPLE) as whole, h5py.File(tmp_path / "few.h5", "w") as few:
        for formula in list(whole)[:2]:
            group = few.create_group(formula)
            group["atomic_numbers"] = whole[formula]["atomic_numbers"][()]
            for key in ("coordinates", KEYS["energy_key"], KEYS["force_key"]):
                group[key] = whole[formula][key][:4]
    dataset = prepare([tmp_path / "few.h5"], tmp_path / "packed", validation=0.0, **KEYS)
    config = small_config(dataset.directory, max_steps=300)
    config = config.model_copy(update={"loss": LossConfig(**loss), "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=20)})
    fit(config, tmp_path / "run", accelerator="cpu")
    losses = [float(r["loss"]) for r in read_log(tmp_path / "run" / "log.csv")]
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch compiles for a CPU with a C++ compiler, and there is none")
@pytest.mark.filterwarnings("default")  # torch's own, of the non-leaf tensors that it meets on its way
def test_compiled_training_takes_the_same_steps(tmp_path):
    dataset = sample_dataset(tmp_path, validation=0.0)
    config = small_config(dataset.directory, max_steps=2)
    loss, optimizer = LossConfig(conservative_weight=1.0), OptimizerConfig(kind="muon", learning_rate=1e-3)
    # A layer, and evaluation without gradients, have kernels of their own to be compiled, which takes minutes.
    network = dataclasses.replace(config.network, num_layers=1)
    config = config.model_copy(update={"loss": loss, "optimizer": optimizer, "network": network})
    for compiled in (False, True):
        run = config.run.model_copy(update={"compile": compiled})
        fit(config.model_copy(update={"run": run}), tmp_path / str(compiled), accelerator="cpu")
    eager, compiled = ([float(r["loss"]) for r in read_log(tmp_path / c / "log.csv") if r["loss"]] for c in ("False", "True"))
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_energies_alone(tmp_path):
    dataset = sample_dataset(tmp_path, energies_only=True, force_key=None)
    config = small_config(dataset.directory)
    with pytest.raises(ConfigError, match=r"packed has no forces to train on, but loss.force_weight is 1; set to 0"):
        fit(config, tmp_path / "run", accelerator="cpu")
    module = fit(config.model_copy(update={"loss": LossConfig(force_weight=0.0)}), tmp_path / "run", accelerator="cpu")
    assert "force_rmse" not in module.validation_errors
    assert np.isfinite(module.validation_errors["energy_rmse"])


class TestHuberLoss:
    """Energies and forces that are off by known amounts: 2 molecules, labels with spreads s_E and s_F."""

    def per_molecule(self, tmp_path, energy_error, force_error, **config):
        dataset = sample_dataset(tmp_path)
        batch = Collator(dataset, NUMBERS, 4.0)(np.arange(2))
        batch = Batch(**{**batch.__dict__, "forces": batch.forces.double()})
        energies = batch.energies + energy_error
        direct = (batch.forces + force_error).requires_grad_(True)
        loss = EnergyForceLoss(LossConfig(**config), energy_scale=0.4, force_scale=1.4).per_molecule(energies, direct, None, batch)
        return loss, torch.autograd.grad(loss.sum(), direct)[0]

    def test_small_errors_count_as_squares(self, tmp_path):
        squares, gradient = self.per_molecule(tmp_path / "a", 0.02, 0.05)
        robust, robust_gradient = self.per_molecule(tmp_path / "b", 0.02, 0.05, energy_huber=0.1, force_huber=0.1)
        torch.testing.assert_close(robust, squares)
        torch.testing.assert_close(robust_gradient, gradient)

    def test_the_slope_is_bounded(self, tmp_path):
        _, at = self.per_molecule(tmp_path / "a", 0.0, 0.1 * 1.4, force_weight=1.0, energy_weight=0.0, force_huber=0.1)
        _, far = self.per_molecule(tmp_path / "b", 0.0, 1e6, force_weight=1.0, energy_weight=0.0, force_huber=0.1)
        torch.testing.assert_close(far, at, rtol=1e-5, atol=0.0)
        _, unbounded = self.per_molecule(tmp_path / "c", 0.0, 1e6, force_weight=1.0, energy_weight=0.0)
        assert unbounded.abs().max() > 1e4 * far.abs().max()

    def test_by_hand(self):
        x = torch.tensor([0.0, 0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
        value = huber(x.square(), 1.0)
        torch.testing.assert_close(value, torch.tensor([0.0, 0.25, 1.0, 5.0], dtype=torch.float64))
        torch.testing.assert_close(torch.autograd.grad(value.sum(), x)[0], torch.tensor([0.0, 1.0, 2.0, 2.0], dtype=torch.float64))

    def test_the_length_of_an_error_counts_not_its_direction(self, tmp_path):
        along, _ = self.per_molecule(tmp_path / "a", 0.0, torch.tensor([3.0, 0.0, 0.0]), force_huber=0.5)
        aslant, _ = self.per_molecule(tmp_path / "b", 0.0, torch.tensor([1.0, 2.0, 2.0]), force_huber=0.5)
        torch.testing.assert_close(along, aslant)


class TestForceMatching:
    def test_gradient_equals_that_of_differentiating_twice(self, tmp_path):
        dataset = sample_dataset(tmp_path)
        batch = Collator(dataset, NUMBERS, 4.0)(np.arange(0, len(dataset), 9))
        batch = Batch(**{**batch.__dict__, "positions": batch.positions.double(), "forces": batch.forces.double()})
        network = small_network().double()
        loss = EnergyForceLoss(LossConfig(energy_weight=0.3, force_weight=0.5, conservative_weight=1.0), 0.4, 1.4)
        energies, direct, conservative = predict(network, batch, True, create_graph=True)
        loss.per_molecule(energies, direct, conservative, batch).mean().backward()
        expected = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        network.zero_grad()
        per_molecule, *_ = backward_force_matching(network, positions_only(network), batch, loss)
        got = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        torch.testing.assert_close(per_molecule.mean(), loss.per_molecule(energies, direct, conservative, batch).mean().detach())
        assert float((got - expected).norm() / expected.norm()) < 0.01
        assert float(torch.nn.functional.cosine_similarity(got, expected, dim=0)) > 0.9999

    def test_lone_atoms_teach_their_energy(self):
        nowhere = np.zeros((3, 3), dtype=np.float32)
        batch = assemble(np.array([0, 1, 1]), nowhere, np.arange(4), np.array([2.7, 6.0, 6.0]), nowhere, np.arange(3), 4.0)
        network = small_network()
        loss = EnergyForceLoss(LossConfig(conservative_weight=1.0), 0.4, 1.4)
        _, energies, direct, conservative = backward_force_matching(network, positions_only(network), batch, loss)
        assert torch.equal(conservative, torch.zeros(3, 3))
        assert torch.equal(direct, torch.zeros(3, 3))
        assert float(energies[1] - energies[2]) == pytest.approx(0.0, abs=1e-6)
        assert abs(float(energies[0] - energies[1])) > 1e-4
        gradients = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        assert torch.isfinite(gradients).all()
        assert gradients.abs().max() > 0


class TestResume:
    @pytest.fixture(autouse=True)
    def as_in_a_terminal(self):
        """Processes in which tests run may ignore Ctrl-C."""
        former = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, former)

    @pytest.mark.parametrize("optimizer", ["adam", "muon"])
    def test_interrupted_and_resumed_equals_uninterrupted(self, tmp_path, optimizer):
        dataset = sample_dataset(tmp_path)
        config = small_config(dataset.directory)
        config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"kind": optimizer})})
        fit(config, tmp_path / "whole", accelerator="cpu")
        whole = weights(tmp_path / "whole")
        # The same run, stopped from outside after its checkpoint at step 4.
        fit(config, tmp_path / "parts", accelerator="cpu")  # makes the files of a finished run ...
        ckpt = _checkpoint_at(config, dataset, tmp_path / "at4", 4)
        os.replace(ckpt, tmp_path / "parts" / "last.ckpt")  # ... of which the last checkpoint is that of step 4
        fit(None, tmp_path / "parts", resume=True, accelerator="cpu")
        for name, value in weights(tmp_path / "parts").items():
            assert torch.equal(value, whole[name]), name
        steps = [int(r["step"]) for r in read_log(tmp_path / "parts" / "log.csv") if r["loss"]]
        assert steps == [1, 2, 3, 4, 5, 6]

    def test_sigkill(self, tmp_path):
        """A process killed without warning leaves a checkpoint from which the same weights come."""
        dataset = sample_dataset(tmp_path)
        config = small_config(dataset.directory, max_steps=60, checkpoint_every=5, validate_every=25)
        fit(config, tmp_path / "whole", accelerator="cpu")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        command = [sys.executable, "-m", "training", "fit", str(tmp_path / "config.yaml"), "-o", str(tmp_path / "killed"), "--accelerator", "cpu"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        last = tmp_path / "killed" / "last.ckpt"
        deadline = time.monotonic() + 120
        while not last.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert torch.load(last, weights_only=True)["global_step"] < 60, "the run ended before it was killed"
        resumed = subprocess.run([*command[:4], "-o", str(tmp_path / "killed"), "--resume", "--accelerator", "cpu"], cwd=ROOT, capture_output=True)
        assert resumed.returncode == 0, resumed.stderr.decode()
        whole = weights(tmp_path / "whole")
        for name, value in weights(tmp_path / "killed").items():
            assert torch.equal(value, whole[name]), name

    @pytest.mark.parametrize(("step", "number"), [(3, signal.SIGTERM), (4, signal.SIGINT), (6, signal.SIGTERM)])
    def test_stopped_by_a_signal(self, tmp_path, monkeypatch, step, number):
        """At the step reached, after its validation if it has one; the run goes on as if nothing had been, and at its last step it is done."""
        dataset = sample_dataset(tmp_path)
        config = small_config(dataset.directory, checkpoint_every=100)
        fit(config, tmp_path / "whole", accelerator="cpu")
        with monkeypatch.context() as patch:
            send_at_step(patch, step, number)
            if step < 6:
                with pytest.raises(TrainingStopped, match=f"stopped at step {step}") as stopped:
                    fit(config, tmp_path / "parts", accelerator="cpu")
                assert stopped.value.exit_code == 128 + number
                assert load_checkpoint(tmp_path / "parts" / "last.ckpt").step == step
            else:
                fit(config, tmp_path / "parts", accelerator="cpu")
        fit(None, tmp_path / "parts", resume=True, accelerator="cpu")
        assert_same_run(tmp_path / "parts", tmp_path / "whole")

    def test_a_second_signal_ends_the_run_at_once(self, tmp_path, monkeypatch):
        dataset = sample_dataset(tmp_path)
        config = small_config(dataset.directory)

        def twice(self, batch, batch_idx):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(TrainingModule, "training_step", twice)
        with pytest.raises(TrainingStopped, match="stopped at step 0") as stopped:
            fit(config, tmp_path / "run", accelerator="cpu")
        assert stopped.value.exit_code == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_the_command_says_how_to_go_on(self, tmp_path, monkeypatch):
        dataset = sample_dataset(tmp_path)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(small_config(dataset.directory).model_dump(mode="json")))
        send_at_step(monkeypatch, 1, signal.SIGTERM)
        result = CliRunner().invoke(app, ["fit", str(tmp_path / "config.yaml"), "-o", str(tmp_path / "run"), "--accelerator", "cpu"])
        assert result.exit_code == 143
        assert "stopped at step 1 (SIGTERM); continue with --resume" in result.output

    def test_a_run_whose_checkpoint_preceded_a_validation_still_has_it(self, tmp_path, monkeypatch):
        """A kill in the validation of a step must not lose it: step 4 is saved after it."""
        dataset = sample_dataset(tmp_path)
        config = small_config(dataset.directory)
        fit(config, tmp_path / "whole", accelerator="cpu")
        with monkeypatch.context() as patch:
            patch.setattr(TrainingModule, "validation_step", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                fit(config, tmp_path / "parts", accelerator="cpu")
        assert load_checkpoint(tmp_path / "parts" / "last.ckpt").step == 2
        fit(None, tmp_path / "parts", resume=True, accelerator="cpu")
        assert_same_run(tmp_path / "parts", tmp_path / "whole")

    def test_a_copy_of_the_directory_goes_on_with_the_best_error(self, tmp_path, monkeypatch):
        """Errors rise here, so the first validation stays the best."""

        def rising(module):
            module.validation_errors = {"energy_rmse": 1.0}
            module.log("validation_error", float(module.global_step))

        monkeypatch.setattr(TrainingModule, "on_validation_epoch_end", rising)
        data, schedule = sample_dataset(tmp_path).directory, OptimizerConfig(schedule="steps", learning_rate=1e-3)
        short, longer = (small_config(data, max_steps=n, validate_every=2).model_copy(update={"optimizer": schedule}) for n in (2, 4))
        fit(short, tmp_path / "run", accelerator="cpu")
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        for run in ("run", "copy"):
            fit(longer, tmp_path / run, resume=True, accelerator="cpu")
            steps = [load_checkpoint(tmp_path / run / f"{name}.ckpt").step for name in ("best", "last")]
            assert steps == [2, 4], run

    def test_other_processes_than_before_are_refused(self, tmp_path):
        dataset = sample_dataset(tmp_path)
        fit(small_config(dataset.directory, max_steps=2), tmp_path / "run", accelerator="cpu")
        last = tmp_path / "run" / "last.ckpt"
        saved = torch.load(last, weights_only=True)
        assert saved["openmm_se3"]["processes"] == 1
        saved["openmm_se3"]["processes"] = 2
        torch.save(saved, last)
        with pytest.raises(CheckpointError, match=r"trained by 2 processes, one for each device, and is resumed with 1: .* that make 2, or start"):
            fit(None, tmp_path / "run", resume=True, accelerator="cpu")
        del saved["openmm_se3"]["processes"]  # as earlier versions wrote it
        torch.save(saved, last)
        fit(None, tmp_path / "run", resume=True, accelerator="cpu")

    def test_one_process_in_a_directory(self, tmp_path):
        dataset = sample_dataset(tmp_path)
        config = small_config(dataset.directory)
        program = f"""
import os, signal
from pathlib import Path
from training.config import read_config
from training.fit import fit
from training.module import TrainingModule

def killed(self, batch, batch_idx):
    print("training", flush=True)
    signal.pause()

TrainingModule.training_step = killed
fit(read_config(Path({str(tmp_path / "config.yaml")!r})), Path({str(tmp_path / "run")!r}), accelerator="cpu")
"""
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        with subprocess.Popen([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
            try:
                assert other.stdout.readline().strip() == "training"
                for resume in (False, True):
                    with pytest.raises(FileExistsError, match=r"another process trains in .*run; wait for its end, or choose"):
                        fit(config, tmp_path / "run", resume=resume, accelerator="cpu")
            finally:
                other.send_signal(signal.SIGKILL)
        fit(config, tmp_path / "run", accelerator="cpu")  # it left no step and no lock

    def test_refusals(self, tmp_path):
        dataset = sample_dataset(tmp_path)
        with pytest.raises(CheckpointError, match="no run to resume"):
            fit(None, tmp_path / "nothing", resume=True)
        fit(small_config(dataset.directory), tmp_path / "run", accelerator="cpu")
        with pytest.raises(ConfigError, match=r"differs from .*run.seed was 0, now 1.*resume with that one"):
            fit(small_config(dataset.directory, seed=1), tmp_path / "run", resume=True)
        with pytest.raises(ConfigError, match=r"run.max_steps was 6, now 9.*warmup-cosine fell over the 6 steps.*initial_model: .*last.ckpt"):
            fit(small_config(dataset.directory, max_steps=9), tmp_path / "run", resume=True)
        with pytest.raises(ConfigError, match=r"run.max_steps was 6, now 3.*resume with that one"):
            fit(small_config(dataset.directory, max_steps=3), tmp_path / "run", resume=True)

    def test_a_longer_run_of_a_schedule_that_does_not_know_its_end(self, tmp_path):
        dataset = sample_dataset(tmp_path)
        short, long = (
            config.model_copy(update={"optimizer": OptimizerConfig(schedule="steps", milestones=(3, 7), learning_rate=5e-3)})
            for config in (small_config(dataset.directory, max_steps=n, validate_every=3) for n in (5, 9))
        )
        fit(long, tmp_path / "whole", accelerator="cpu")
        fit(short, tmp_path / "parts", accelerator="cpu")
        fit(long, tmp_path / "parts", resume=True, accelerator="cpu")
        assert read_config(tmp_path / "parts" / "config.yaml") == long
        assert_same_run(tmp_path / "parts", tmp_path / "whole", validations=[3, 5, 6, 9])


def send_at_step(patch, step: int, number: int) -> None:
    """Have a training receive a signal within a step."""
    whole = TrainingModule.training_step

    def interrupted(self, batch, batch_idx):
        if self.batches_seen + 1 == step:
            os.kill(os.getpid(), number)
        whole(self, batch, batch_idx)

    patch.setattr(TrainingModule, "training_step", interrupted)


def assert_same_run(run: Path, whole: Path, validations: list[int] | None = None) -> None:
    """Weights and log equal those of another run, but for the steps that were validated, if these are given."""
    expected = weights(whole)
    for name, value in weights(run).items():
        assert torch.equal(value, expected[name]), name
    rows, of_whole = read_log(run / "log.csv"), read_log(whole / "log.csv")
    if validations is None:
        assert rows == of_whole
        assert load_checkpoint(run / "best.ckpt").step == load_checkpoint(whole / "best.ckpt").step
    else:
        assert [int(r["step"]) for r in rows if r["validation_energy_rmse"]] == validations
        assert [r for r in rows if r["loss"]] == [r for r in of_whole if r["loss"]]


def _checkpoint_at(config, dataset, directory: Path, step: int) -> Path:
    """Checkpoint of a run that is stopped at a step, as a kill after that checkpoint would leave it."""
    import lightning

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == step:
                trainer.save_checkpoint(directory / "kept.ckpt")
                trainer.should_stop = True

    lightning.seed_everything(config.run.seed, verbose=False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=config.run.max_steps,
        min_steps=0,
        val_check_interval=config.run.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Stop()],
        plugins=[SafeCheckpointIO()],
        inference_mode=False,
    )
    trainer.fit(TrainingModule(config, dataset))
    return directory / "kept.ckpt"


class TestNonFinite:
    def test_bad_batch_is_skipped_named_and_counted(self, tmp_path, capsys):
        dataset = sample_dataset(tmp_path, validation=0.0)
        energies = np.memmap(dataset.directory / "energies.bin", dtype=np.float64, mode="r+")
        energies[5] = np.inf
        energies.flush()
        module = fit(small_config(dataset.directory, max_steps=40), tmp_path / "run", accelerator="cpu")
        assert module.bad_batches
        assert {b["frame"] for b in module.bad_batches} == {5}
        assert module.bad_batches[0]["formula"] == dataset.formula(5)
        assert module.bad_batches[0]["reason"] == "loss not finite"
        assert f"{dataset.formula(5)} (frame 5)" in capsys.readouterr().out
        assert all(torch.isfinite(p).all() for p in module.network.parameters())

    def test_divergence_stops_the_run(self, tmp_path):
        dataset = sample_dataset(tmp_path, validation=0.0)
        energies = np.memmap(dataset.directory / "energies.bin", dtype=np.float64, mode="r+")
        energies[:] = np.nan
        energies.flush()
        with pytest.raises(NonFiniteTraining, match="step 0: 20 batches in a row were not finite"):
            fit(small_config(dataset.directory, max_steps=40), tmp_path / "run", accelerator="cpu")

    @pytest.mark.parametrize(("energies_only", "shifted"), [(False, False), (True, False), (True, True)])
    def test_dead_networks_stop_the_run(self, tmp_path, monkeypatch, energies_only, shifted):
        """Too high a rate can push every ReLU of equation 2.9 below zero: nothing is infinite, but zeros come out for ever."""

        def dead(config, numbers):
            network = build_network(config, numbers)
            for norm in (layer for group in network.norms for layer in group.norms):
                torch.nn.init.constant_(norm.bias, -100.0)
            return network

        monkeypatch.setattr("training.module.build_network", dead)
        options = {"energies_only": True, "force_key": None} if energies_only else {}
        if shifted:
            options["self_energies"] = str(free_atoms(tmp_path))
        dataset = sample_dataset(tmp_path, validation=0.0, **options)
        reference = ReferenceConfig(channels=(3, 2), num_heads=2, num_layers=2, n_basis=4, radial_hidden=4, hidden=4)
        loss = LossConfig(force_weight=0.0 if energies_only else 1.0)
        config = small_config(dataset.directory, max_steps=40).model_copy(update={"network": reference, "loss": loss})
        with pytest.raises(NonFiniteTraining, match="step 20: 20 batches in a row were answered with zeros or with one energy per atom"):
            fit(config, tmp_path / "run", accelerator="cpu")


class TestCheckpoints:
    def test_full_disk_keeps_the_last_good_one(self, tmp_path, monkeypatch):
        io = SafeCheckpointIO()
        io.save_checkpoint({"value": torch.ones(3)}, tmp_path / "last.ckpt")
        good = (tmp_path / "last.ckpt").read_bytes()

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"No space left.*last good checkpoint is kept"):
            io.save_checkpoint({"value": torch.zeros(3)}, tmp_path / "last.ckpt")
        assert (tmp_path / "last.ckpt").read_bytes() == good
        assert os.listdir(tmp_path) == ["last.ckpt"]

    def test_truncated_and_foreign(self, tmp_path):
        (tmp_path / "a.ckpt").write_bytes(b"nothing of ours")
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            load_checkpoint(tmp_path / "a.ckpt")
        torch.save({"state_dict": {}}, tmp_path / "b.ckpt")
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            load_checkpoint(tmp_path / "b.ckpt")
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            load_checkpoint(tmp_path / "c.ckpt")

    def test_damaged_last_checkpoint(self, tmp_path):
        dataset = sample_dataset(tmp_path)
        fit(small_config(dataset.directory), tmp_path / "run", accelerator="cpu")
        last, best = (tmp_path / "run" / name for name in ("last.ckpt", "best.ckpt"))
        last.write_bytes(last.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match=r"last.ckpt: no checkpoint to go on from .*put a copy of .*best.ckpt in its place"):
            fit(None, tmp_path / "run", resume=True, accelerator="cpu")
        shutil.copy(best, last)
        fit(None, tmp_path / "run", resume=True, accelerator="cpu")

    def test_other_data_are_refused_on_resume(self, tmp_path):
        first = sample_dataset(tmp_path)
        fit(small_config(first.directory), tmp_path / "run", accelerator="cpu")
        shutil.rmtree(first.directory)
        sample_dataset(tmp_path, force_key=None, energies_only=True)
        with pytest.raises(DataError, match="trained on other data"):
            fit(None, tmp_path / "run", resume=True, accelerator="cpu")

    @pytest.mark.parametrize("change", [{"seed": 7}, {"test": 0.3}, {"self_energies": "table"}])
    def test_the_same_frames_prepared_otherwise_are_refused_on_resume(self, tmp_path, change):
        """Another split would validate with frames that were trained on."""
        first = sample_dataset(tmp_path)
        fit(small_config(first.directory), tmp_path / "run", accelerator="cpu")
        if "self_energies" in change:
            change = {"self_energies": str(free_atoms(tmp_path))}
        shutil.rmtree(first.directory)
        sample_dataset(tmp_path, **change)
        with pytest.raises(DataError, match=r"prepared anew since the checkpoint was written: (split_seed|split_fractions|[HCNO]) was"):
            fit(None, tmp_path / "run", resume=True, accelerator="cpu")

    def test_another_split_by_files_of_the_same_names_is_refused_on_resume(self, tmp_path):
        frames = distorted_waters(12)

        def prepared(n_trained):
            shutil.rmtree(tmp_path / "packed", ignore_errors=True)
            write(tmp_path / "train.xyz", frames[:n_trained], format="extxyz")
            write(tmp_path / "validation.xyz", frames[n_trained:], format="extxyz")
            return prepare([tmp_path / "train.xyz"], tmp_path / "packed", validation_data=[tmp_path / "validation.xyz"], level_of_theory="none")

        fit(small_config(prepared(8).directory), tmp_path / "run", accelerator="cpu")
        prepared(7)
        with pytest.raises(DataError, match=r"prepared anew since the checkpoint was written: split_sha256 was"):
            fit(None, tmp_path / "run", resume=True, accelerator="cpu")

    def test_forces_that_are_placeholders(self, tmp_path):
        frames = distorted_waters(4)
        for frame in frames:
            frame.arrays["forces"][:] = 0.0
        write(tmp_path / "x.xyz", frames, format="extxyz")
        dataset = prepare([tmp_path / "x.xyz"], tmp_path / "packed", split_by="frame", level_of_theory="none")
        with pytest.raises(DataError, match=r"all forces of the frames to train on are zero.*--energies-only"):
            fit(small_config(dataset.directory), tmp_path / "run", accelerator="cpu")

    def test_compiling_without_a_compiler(self, tmp_path, monkeypatch):
        def compile_nothing(*_, **__):
            raise InductorError(InvalidCxxCompiler(), None)

        monkeypatch.setattr("lightning.Trainer.fit", compile_nothing)
        with pytest.raises(ConfigError, match=r"run.compile needs a C\+\+ compiler"):
            fit(small_config(sample_dataset(tmp_path).directory, compile=True), tmp_path / "run", accelerator="cpu")

    @pytest.mark.parametrize(("kind", "killed"), [("last.ckpt", False), ("model.pt", False), ("last.ckpt", True)])
    def test_initial_model_starts_from_its_weights(self, tmp_path, kind, killed):
        """Also where the run was killed before its first checkpoint."""
        dataset = sample_dataset(tmp_path)
        fit(small_config(dataset.directory), tmp_path / "first", accelerator="cpu")
        if kind == "model.pt":
            export(tmp_path / "first" / "last.ckpt", tmp_path / "first" / kind)
        config = small_config(dataset.directory, max_steps=1)
        config = config.model_copy(
            update={
                "initial_model": str(tmp_path / "first" / kind),
                "optimizer": OptimizerConfig(learning_rate=1e-12, warmup_steps=0, ema_decay=0.0),
            }
        )
        if killed:
            (tmp_path / "second").mkdir()
            (tmp_path / "second" / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        fit(config, tmp_path / "second", resume=killed, accelerator="cpu")
        start, end = load_checkpoint(tmp_path / "first" / "last.ckpt"), load_checkpoint(tmp_path / "second" / "last.ckpt")
        for a, b in zip(start.network.parameters(), end.network.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)

    def test_initial_model_of_other_sizes_is_refused(self, tmp_path):
        dataset = sample_dataset(tmp_path)
        config = small_config(dataset.directory)
        fit(config, tmp_path / "first", accelerator="cpu")
        wider = dataclasses.replace(config.network, hidden=16)
        config = config.model_copy(update={"initial_model": str(tmp_path / "first" / "last.ckpt"), "network": wider})
        with pytest.raises(ConfigError, match="other sizes than the network of the configuration"):
            fit(config, tmp_path / "second", accelerator="cpu")

    @pytest.mark.parametrize("kind", ["last.ckpt", "model.pt"])
    def test_initial_model_of_other_settings_is_refused(self, tmp_path, kind):
        """A cutoff leaves no trace in the sizes of tensors."""
        config = small_config(sample_dataset(tmp_path).directory, max_steps=1)
        fit(config, tmp_path / "first", accelerator="cpu")
        if kind == "model.pt":
            export(tmp_path / "first" / "last.ckpt", tmp_path / "first" / kind)
        start = str(tmp_path / "first" / kind)
        with pytest.raises(ConfigError, match=r"network.cutoff is 4.0, the configuration has 5.0; set network.cutoff to 4.0, or start without"):
            initial_weights(start, dataclasses.replace(config.network, cutoff=5.0))

    def test_the_released_model_fits_the_default_network(self):
        assert initial_weights("se3-ani1x", NetworkConfig())

    def test_initial_model_of_other_elements_is_refused(self, tmp_path):
        dataset = sample_dataset(tmp_path)
        config = small_config(dataset.directory, max_steps=1)
        fit(config, tmp_path / "first", accelerator="cpu")
        start = str(tmp_path / "first" / "last.ckpt")
        with pytest.raises(ConfigError, match=r"cannot learn new elements: leave molecules with S out of the data .*or start without initial_model"):
            initial_weights(start, dataclasses.replace(config.network, elements=("H", "C", "N", "O", "S")))
        with pytest.raises(ConfigError, match=r"has H, O; set network.elements to \[H, C, N, O\]"):
            initial_weights(start, dataclasses.replace(config.network, elements=("H", "O")))


class TestConfig:
    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            ({"data": "x", "learningrate": 1}, "learningrate: unknown key"),
            ({"data": "x", "optimizer": {"schedule": "steps", "warmup_steps": 9}}, "warmup_steps have no effect with schedule 'steps'"),
            ({"data": "x", "optimizer": {"milestones": [9], "drop": 0.5}}, "milestones and drop have no effect with schedule 'warmup-cosine'"),
            ({"data": "x", "run": {"steps": 3}}, "run.steps: unknown key"),
            ({"data": "x", "network": {"heads": 3}}, "network.heads: unknown key"),
            ({"data": "x", "run": {"max_steps": -1}}, r"run.max_steps: .*greater than 0 \(got -1\)"),
            ({"data": "x", "network": {"hidden_channels": 10, "num_heads": 4}}, "must be divisible by num_heads"),
            ({"data": "x", "network": {"channels": [4, 4]}}, "three positive numbers"),
            ({"data": "x", "loss": {"energy_weight": 0, "force_weight": 0}}, "nothing to learn"),
            ({}, "data: Field required"),
            ({"data": "x", "network": {"elements": ["H", "Qq"]}}, "elements must be chemical symbols such as H or Cl, at least one, got Qq"),
            ({"data": "x", "network": {"elements": []}}, "elements must be chemical symbols .*got none"),
            ({"data": "x", "network": {"elements": ["H", "C", "H"]}}, "elements must each be named once, got H, C, H"),
            ({"data": "x", "network": {"num_heads": 0}}, "num_heads must be at least 1, got 0"),
            ({"data": "x", "network": {"num_heads": -4}}, "num_heads must be at least 1, got -4"),
            ({"data": "x", "network": {"hidden_channels": 0}}, "hidden_channels must be at least 1, got 0"),
            ({"data": "x", "network": {"n_basis": 0}}, "n_basis must be at least 1, got 0"),
            ({"data": "x", "network": {"hidden": 0}}, "hidden must be at least 1, got 0"),
            ({"data": "x", "network": {"form": "reference", "num_heads": 0}}, "num_heads must be at least 1, got 0"),
            ({"data": "x", "network": {"form": "reference", "elements": ["X"]}}, "elements must be chemical symbols"),
            ({"data": "x", "network": {"cutoff": float("nan")}}, r"network.cutoff: Input should be a finite number \(got nan\)"),
            ({"data": "x", "optimizer": {"learning_rate": float("inf")}}, "learning_rate: Input should be a finite number"),
            ({"data": "x", "run": {"seed": -1}}, "run.seed: .*greater than or equal to 0"),
            (None, "top level"),
        ],
    )
    def test_refusals_name_the_key(self, raw, message):
        with pytest.raises(ConfigError, match=message):
            parse_config(raw, "test")

    def test_files(self, tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_config(tmp_path / "none.yaml")
        (tmp_path / "bad.yaml").write_text("a: [1")
        with pytest.raises(ConfigError, match="not valid YAML"):
            read_config(tmp_path / "bad.yaml")
        (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
        with pytest.raises(ConfigError, match=r"binary\.yaml: not valid YAML"):
            read_config(tmp_path / "binary.yaml")
        with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read as YAML"):
            read_ablation(tmp_path / "binary.yaml")

    @pytest.mark.parametrize("path", sorted((ROOT / "training" / "configs").glob("*.yaml")), ids=lambda p: p.stem)
    def test_shipped_configurations_are_valid(self, path):
        read_config(path)


class TestAblation:
    @pytest.mark.parametrize("command", ["sweep", "ablate"])
    def test_killed_before_the_first_checkpoint_it_goes_on(self, tmp_path, monkeypatch, command):
        dataset = sample_dataset(tmp_path)
        config = small_config(dataset.directory, max_steps=2, checkpoint_every=100)
        begin = (lambda: sweep(config, tmp_path, (0.1,), accelerator="cpu")) if command == "sweep" else lambda: ablate({"a": config}, tmp_path)
        whole = TrainingModule.training_step
        for step in (1, 2):  # without, and with a row in the log
            with monkeypatch.context() as patch:
                patch.setattr(TrainingModule, "training_step", lambda self, *a, n=step: 1 / 0 if self.batches_seen + 1 == n else whole(self, *a))
                with pytest.raises(ZeroDivisionError):
                    begin()
        assert [row["step"] for row in begin()] == [2]

    def test_variants_are_trained_alike_and_kept(self, tmp_path):
        dataset = sample_dataset(tmp_path)
        base = small_config(dataset.directory, max_steps=4).model_dump(mode="json")
        raw = {"base": base, "variants": {"whole": {}, "two layers": {"network": {"num_layers": 2}}}}
        (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
        variants = read_ablation(tmp_path / "ablation.yaml")
        assert variants["two layers"].network.num_layers == 2
        assert variants["two layers"].network.channels == variants["whole"].network.channels
        rows = ablate(variants, tmp_path / "runs", accelerator="cpu")
        assert [row["variant"] for row in rows] == ["whole", "two layers"]
        assert rows[0]["parameters"] > rows[1]["parameters"]
        assert all(row["step"] == 4 and row["validation_force_rmse"] > 0 for row in rows)
        assert json.loads((tmp_path / "runs" / "ablation.json").read_text()) == rows
        assert ablate(variants, tmp_path / "runs", accelerator="cpu") == rows

    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            ({"base": {}}, "expected the two sections base and variants"),
            ({"base": {"data": "x"}, "variants": {}}, "variants is empty"),
            ({"base": {"data": "x"}, "variants": {"a": {"network": {"heads": 3}}}}, "ablation.yaml, a: network.heads: unknown key"),
            ({"base": {"data": "x"}, "variants": {"a": [1]}}, "each variant is a name and what it changes, section by section; 'a' is not"),
            ({"base": {"data": "x"}, "variants": {"a b": None, "a-b": None}}, "must differ in more than spaces and hyphens, got a b, a-b"),
            ({"base": {"data": "x"}, "variants": {"a": {}, "b": {"run": {"max_steps": 7}}}}, "equal steps"),
        ],
    )
    def test_refusals(self, tmp_path, raw, message):
        (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(raw))
        with pytest.raises(ConfigError, match=message):
            read_ablation(tmp_path / "ablation.yaml")

    @pytest.mark.parametrize(("name", "variant"), [("production", "as released"), ("fine-tuning", "as benchmarked")])
    def test_shipped_files(self, name, variant):
        assert variant in read_ablation(ROOT / "training" / "configs" / "ablation" / f"{name}.yaml")
