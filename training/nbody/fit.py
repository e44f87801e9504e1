"""Training of the N-body network: the optimizer, schedule, averaging and checkpoints of the potential's training."""

import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from pydantic import ConfigDict, Field, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader

from training.averaging import averaged
from training.callbacks import CsvLog
from training.checkpoint import CheckpointError
from training.config import ConfigError, OptimizerConfig, Section, validated
from training.data.frames import DataError
from training.guard import BatchGuard
from training.nbody.data import NBodyBatch, NBodyData, TrainingStream
from training.nbody.network import NBodyNetworkConfig, NBodyTransformer
from training.nbody.simulate import N_PARTICLES
from training.optimizer import learning_rate, make_optimizer
from training.run import configuration_of_run, train

CHECKPOINT_EVERY, LOG_EVERY = 100, 20
LOG_COLUMNS = ("step", "learning_rate", "gradient_norm", "loss", "train_mse", "validation_mse", "bad_batches")

NBodyNetworkConfig.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[attr-defined]


class NBodyConfig(Section):
    """A run: directory of the trajectories, sizes, optimizer, length.

    Attributes
    ----------
    data : str
        Directory of the trajectories.
    network : NBodyNetworkConfig
        Sizes.
    optimizer : OptimizerConfig
        As for the potential.
    max_steps, batch, validate_every : int
        Optimizer steps, trajectories in each, steps between validations.
    seed : int
        Of weights and batches.
    """

    data: str
    network: NBodyNetworkConfig = NBodyNetworkConfig()
    optimizer: OptimizerConfig = OptimizerConfig(gradient_clip=1.0)
    max_steps: PositiveInt = 20_000
    batch: PositiveInt = 100
    validate_every: PositiveInt = 1_000
    seed: int = Field(default=0, ge=0, lt=2**32)


def read_nbody_config(path: Path) -> NBodyConfig:
    """Read a YAML file; raises `training.config.ConfigError` like `training.config.read_config`."""
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    return validated(NBodyConfig, raw, str(path))


class NBodyModule(lightning.LightningModule):
    """Trains an `NBodyTransformer` on the mean squared error of positions.

    Parameters
    ----------
    config : NBodyConfig
        The run.
    data : NBodyData
        The trajectories.
    """

    def __init__(self, config: NBodyConfig, data: NBodyData) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.data = config, data
        self.network = NBodyTransformer(config.network, N_PARTICLES, data.time_ahead)
        # Spread of what the network has to correct. The median: a few close encounters would make a mean square of their own, and one
        # trajectory that is not finite would leave no scale at all.
        sample = next(iter(TrainingStream(data, 2_000, config.seed)))
        straight = sample.positions + data.time_ahead * sample.velocities
        self.network.scale.fill_(float((sample.targets - straight).square().mean((1, 2)).nanmedian().sqrt()))
        self.ema = averaged(self.network, config.optimizer.ema_decay)
        self.batches_seen = 0
        self.bad_batches: list[dict[str, Any]] = []
        self._not_finite = BatchGuard("were not finite")
        self.latest: dict[str, float] = {}

    def train_dataloader(self) -> DataLoader:
        """Endless batches that continue where the checkpoint stood."""
        return DataLoader(TrainingStream(self.data, self.config.batch, self.config.seed, self.batches_seen), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """The validation split."""
        return DataLoader(list(self.data.evaluation_batches("validation")), batch_size=None)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: NBodyBatch, device: torch.device, dataloader_idx: int) -> NBodyBatch:
        """Move a batch."""
        return NBodyBatch(**{f.name: getattr(batch, f.name).to(device) for f in fields(batch)})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """That of the configuration."""
        return make_optimizer(self.network, self.config.optimizer)

    def training_step(self, batch: NBodyBatch, batch_idx: int) -> None:
        """One step on the mean squared error in units of the network's scale, or a counted and reported skip if it is not finite."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, lightning.pytorch.core.optimizer.LightningOptimizer)
        self.batches_seen += 1
        rate = learning_rate(self.global_step, self.config.optimizer, self.config.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        error = self.network(batch.positions, batch.velocities, batch.charges) - batch.targets
        loss = error.square().mean() / self.network.scale**2
        self.manual_backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optimizer.gradient_clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            self._report_bad_batch(batch, error.detach())
            return
        self._not_finite.see(False, self.global_step)
        optimizer.step()
        self.ema.update_parameters(self.network)
        mse = float(loss.detach() * self.network.scale**2)
        self.latest = {"loss": float(loss.detach()), "mse": mse, "gradient_norm": float(norm), "learning_rate": rate}

    def _report_bad_batch(self, batch: NBodyBatch, error: Tensor) -> None:
        finite = torch.isfinite(error).flatten(1).all(1)
        what = "gradient" if finite.all() else "loss"
        guilty = (batch.trajectories if finite.all() else batch.trajectories[~finite]).tolist()
        self.bad_batches += [{"batch": self.batches_seen, "trajectory": t, "reason": f"{what} not finite"} for t in guilty]
        names = ", ".join(map(str, guilty[:5]))
        self.print(f"batch {self.batches_seen}: {what} not finite, step skipped; {len(guilty)} trajectories: {names}")
        self._not_finite.see(True, self.global_step)

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self._square, self._n = 0.0, 0

    def validation_step(self, batch: NBodyBatch, batch_idx: int) -> None:
        """Add the error of the averaged weights."""
        error = self.ema.module(batch.positions, batch.velocities, batch.charges) - batch.targets
        self._square += float(error.square().mean()) * len(error)
        self._n += len(error)

    def on_validation_epoch_end(self) -> None:
        """Publish the mean squared error."""
        self.validation_errors = {"mse": self._square / self._n}
        self.log("validation_mse", self.validation_errors["mse"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilding the network and resuming need."""
        checkpoint["nbody"] = {
            "config": self.config.model_dump(mode="json"),
            "time_ahead": self.data.time_ahead,
            "data": self.data.metadata,
            "batches_seen": self.batches_seen,
            "bad_batches": self.bad_batches,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the stream of batches, and refuse other trajectories."""
        ours = checkpoint["nbody"]
        if ours["data"] != self.data.metadata:
            raise DataError(f"the checkpoint was trained on other trajectories than are in {self.config.data}; simulate with the same arguments")
        self.batches_seen, self.bad_batches = ours["batches_seen"], ours["bad_batches"]


def fit_nbody(config: NBodyConfig | None, output: Path, resume: bool = False, accelerator: str = "auto") -> NBodyModule:
    """Train; the best weights by validation error stay in ``best.ckpt``, the log in ``log.csv``.

    Parameters
    ----------
    config : NBodyConfig or None
        The run; None only with `resume`, which reads ``config.yaml`` of the run.
    output : Path
        Directory of the run.
    resume : bool
        Continue the run in `output` from its last checkpoint; the result is that of the uninterrupted run.
    accelerator : str
        As in `training.run.train`.

    Returns
    -------
    NBodyModule
        After the last step.

    Raises
    ------
    FileExistsError
        If `output` holds a run and `resume` is False.
    NotADirectoryError
        If `output` is a file.
    ConfigError
        If the configuration given to a resumed run differs from its own, or the machine lacks the hardware.
    CheckpointError, DataError
        For unusable checkpoints and trajectories.
    NonFiniteTraining
        If batch after batch has a loss or gradient that is not finite.
    TrainingStopped
        After SIGTERM or SIGINT.
    """
    config = configuration_of_run(config, output, resume, read_nbody_config)
    data = NBodyData(Path(config.data))
    lightning.seed_everything(config.seed, verbose=False)
    module = NBodyModule(config, data)
    train(
        module,
        config,
        output,
        resume,
        max_steps=config.max_steps,
        checkpoint_every=min(config.validate_every, CHECKPOINT_EVERY),
        validate_every=config.validate_every,
        monitored="validation_mse",
        callbacks=[CsvLog(output / "log.csv", min(LOG_EVERY, config.validate_every), LOG_COLUMNS, unit=1.0), _Lines()],
        accelerator=accelerator,
        devices=1,
    )
    return module


class _Lines(lightning.Callback):
    """A line at every validation."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.start = time.monotonic()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        error = float(trainer.callback_metrics["validation_mse"])
        minutes = (time.monotonic() - self.start) / 60
        pl_module.print(f"step {trainer.global_step}/{trainer.max_steps}  validation MSE {error:.5f}  {minutes:.1f} min")


def load_nbody(path: Path) -> tuple[NBodyTransformer, NBodyConfig, int]:
    """Network with the averaged weights of a checkpoint, its configuration and its step.

    Raises
    ------
    CheckpointError
        If the file is none of `fit_nbody`.
    """
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
        ours = raw["nbody"]
    except Exception as error:
        raise CheckpointError(f"{path}: not a checkpoint of 'python -m training nbody fit' ({error})") from None
    config = validated(NBodyConfig, ours["config"], str(path))
    network = NBodyTransformer(config.network, N_PARTICLES, ours["time_ahead"])
    prefix = "ema.module."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in raw["state_dict"].items() if k.startswith(prefix)})
    return network.eval().requires_grad_(False), config, int(raw["global_step"])
