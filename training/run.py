"""What `fit` and `nbody fit` share: the directory of a run, and the trainer that keeps it resumable."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import lightning
import yaml
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from pydantic import BaseModel

from training.allocator import keep_freed_memory
from training.checkpoint import CheckpointError, SafeCheckpointIO
from training.config import ConfigError

LAST = "last.ckpt"

_Config = TypeVar("_Config", bound=BaseModel)


def configuration_of_run(config: _Config | None, output: Path, resume: bool, read: Callable[[Path], _Config]) -> _Config:
    """The configuration with which to train in a directory; a resumed run keeps its own.

    Parameters
    ----------
    config : BaseModel or None
        The one asked for; None only with `resume`.
    output : Path
        Directory of the run.
    resume : bool
        Whether to continue the run in `output`.
    read : callable
        Reads ``config.yaml``.

    Raises
    ------
    CheckpointError
        If there is no run to resume.
    ConfigError
        If `config` is not that of the resumed run, or missing for a new one.
    FileExistsError
        If `output` holds something and `resume` is False.
    """
    kept = output / "config.yaml"
    if resume:
        if not kept.exists():
            raise CheckpointError(f"{output} holds no run to resume (no config.yaml)")
        own = read(kept)
        if config is not None and config != own:
            raise ConfigError(f"the configuration differs from {kept}; resume with that one, or start a new run in another directory")
        return own
    if rank_zero_only.rank == 0 and output.exists() and any(output.iterdir()):
        # Only the first process looks: the others start after it has written.
        raise FileExistsError(f"{output} is not empty; choose another output directory, or resume the run in it with --resume")
    if config is None:
        raise ConfigError("a new run needs a configuration")
    return config


def train(
    module: lightning.LightningModule,
    config: BaseModel,
    output: Path,
    resume: bool,
    max_steps: int,
    checkpoint_every: int,
    validate_every: int | None,
    monitored: str,
    callbacks: list[lightning.Callback],
    **hardware: Any,
) -> None:
    """Train a module to its last step; a kill at any instant leaves a directory that can be resumed.

    Parameters
    ----------
    module : LightningModule
        Whose stream of batches goes on where its checkpoint stood.
    config : BaseModel
        Kept as ``config.yaml``.
    output : Path
        Directory of the run: ``last.ckpt``, ``best.ckpt`` and what `callbacks` write.
    resume : bool
        Whether to start from ``last.ckpt``, if there is one.
    max_steps, checkpoint_every : int
        Optimizer steps in all, and between checkpoints.
    validate_every : int or None
        Steps between validations; None for no validation, and no ``best.ckpt``.
    monitored : str
        The logged error by which ``best.ckpt`` is chosen.
    callbacks : list of Callback
        Further ones.
    **hardware
        Handed to `lightning.Trainer`.

    Raises
    ------
    CheckpointError
        If a checkpoint cannot be read or written.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*pre-optimization state.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*that has no length.*|.*no `__len__`.*")
    warnings.filterwarnings("ignore", ".*ModelCheckpoint.*exists and is not empty.*|.*Checkpoint directory.*")
    callbacks = [
        *callbacks,
        ModelCheckpoint(output, filename="last", every_n_train_steps=checkpoint_every, save_top_k=1, enable_version_counter=False),
    ]
    if validate_every is not None:
        best = ModelCheckpoint(output, filename="best", monitor=monitored, save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=False)
        callbacks.append(best)
    trainer = lightning.Trainer(
        max_steps=max_steps,
        val_check_interval=validate_every,
        check_val_every_n_epoch=1 if validate_every is None else None,
        limit_val_batches=0 if validate_every is None else None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        plugins=[SafeCheckpointIO()],
        inference_mode=False,
        **hardware,
    )
    if isinstance(trainer.accelerator, CPUAccelerator):
        keep_freed_memory()
    last = output / LAST
    trainer.fit(module, ckpt_path=str(last) if resume and last.exists() else None, weights_only=True)
    trainer.save_checkpoint(last)
