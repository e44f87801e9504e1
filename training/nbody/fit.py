"""Training of the N-body network: the optimizer, schedule, averaging and checkpoints of the potential's training."""

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from training.checkpoint import CheckpointError, SafeCheckpointIO
from training.config import ConfigError, OptimizerConfig, validated
from training.module import learning_rate
from training.nbody.data import NBodyBatch, NBodyData, TrainingStream
from training.nbody.network import NBodyNetworkConfig, NBodyTransformer
from training.nbody.simulate import N_PARTICLES

NBodyNetworkConfig.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]


class NBodyConfig(BaseModel):
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

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    network: NBodyNetworkConfig = NBodyNetworkConfig()
    optimizer: OptimizerConfig = OptimizerConfig(gradient_clip=1.0)
    max_steps: PositiveInt = 20_000
    batch: PositiveInt = 100
    validate_every: PositiveInt = 1_000
    seed: int = 0


def read_nbody_config(path: Path) -> NBodyConfig:
    """Read a YAML file; raises `training.config.ConfigError` like `training.config.read_config`."""
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
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
        self.config, self.data = config, data
        self.network = NBodyTransformer(config.network, N_PARTICLES, data.time_ahead)
        # Spread of what the network has to correct. The median: a few close encounters would make a mean square of their own.
        sample = next(iter(TrainingStream(data, 2_000, config.seed)))
        straight = sample.positions + data.time_ahead * sample.velocities
        self.network.scale.fill_(float((sample.targets - straight).square().mean((1, 2)).median().sqrt()))
        self.ema = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(config.optimizer.ema_decay))
        self.ema.requires_grad_(False)

    def train_dataloader(self) -> DataLoader:
        """Endless batches."""
        return DataLoader(TrainingStream(self.data, self.config.batch, self.config.seed), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """The validation split."""
        return DataLoader(list(self.data.evaluation_batches("validation")), batch_size=None)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: NBodyBatch, device: torch.device, dataloader_idx: int) -> NBodyBatch:
        """Move a batch."""
        return NBodyBatch(*(getattr(batch, k).to(device) for k in ("positions", "velocities", "charges", "targets")))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.network.parameters(), lr=self.config.optimizer.learning_rate)

    def training_step(self, batch: NBodyBatch, batch_idx: int) -> Tensor:
        """Mean squared error in units of the network's scale."""
        rate = learning_rate(self.global_step, self.config.optimizer, self.config.max_steps)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate
        error = self.network(batch.positions, batch.velocities, batch.charges) - batch.targets
        loss = error.square().mean()
        self.log_dict({"train_mse": loss, "learning_rate": rate})
        return loss / self.network.scale**2

    def on_train_batch_end(self, *_: Any) -> None:
        """Average the weights."""
        self.ema.update_parameters(self.network)

    def validation_step(self, batch: NBodyBatch, batch_idx: int) -> None:
        """Error of the averaged weights."""
        error = self.ema.module(batch.positions, batch.velocities, batch.charges) - batch.targets
        self.log("validation_mse", error.square().mean(), batch_size=len(batch.targets), prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilding the network needs."""
        checkpoint["nbody"] = {"config": self.config.model_dump(mode="json"), "time_ahead": self.data.time_ahead}


def fit_nbody(config: NBodyConfig, output: Path, accelerator: str = "auto") -> NBodyModule:
    """Train; the best weights by validation error stay in ``best.ckpt``, the log in ``metrics.csv``.

    Parameters
    ----------
    config : NBodyConfig
        The run.
    output : Path
        Directory of the run.
    accelerator : str
        Handed to `lightning.Trainer`.

    Returns
    -------
    NBodyModule
        After the last step.

    Raises
    ------
    FileExistsError
        If `output` is not empty.
    DataError
        For unusable trajectories.
    """
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; choose another output directory")
    data = NBodyData(Path(config.data))
    lightning.seed_everything(config.seed, verbose=False)
    module = NBodyModule(config, data)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (".*LeafSpec.*", ".*does not have many workers.*", ".*that has no length.*|.*no `__len__`.*", ".*exists and is not empty.*"):
        warnings.filterwarnings("ignore", message)
    best = ModelCheckpoint(
        output, filename="best", monitor="validation_mse", save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=False
    )
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=config.max_steps,
        val_check_interval=config.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=config.optimizer.gradient_clip,
        logger=CSVLogger(output, name="", version=""),
        log_every_n_steps=min(100, config.validate_every),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[best, _Lines()],
        plugins=[SafeCheckpointIO()],
    )
    trainer.fit(module)
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
