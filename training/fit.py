"""`fit`: configuration and packed data in, a directory with checkpoints, log and learning curves out."""

import logging
import warnings
from pathlib import Path

import lightning
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from training.callbacks import CsvLog, ProgressDisplay
from training.checkpoint import CheckpointError, SafeCheckpointIO, initial_weights
from training.config import ConfigError, FitConfig, read_config
from training.data.packed import PackedDataset
from training.module import TrainingModule

LAST = "last.ckpt"


def fit(config: FitConfig | None, output: Path, resume: bool = False, accelerator: str = "auto", devices: int = 1, nodes: int = 1) -> TrainingModule:
    """Train a network.

    Parameters
    ----------
    config : FitConfig or None
        The run; None only with `resume`, which reads ``config.yaml`` of the run.
    output : Path
        Directory of the run: ``config.yaml``, ``last.ckpt``, ``best.ckpt``, ``log.csv``, ``learning_curves.png``.
    resume : bool
        Continue the run in `output` from its last checkpoint; the result is that of the uninterrupted run.
    accelerator, devices, nodes
        Handed to `lightning.Trainer`. With more than one device there is a process for each; every one takes batches of its own, and a
        step is that of all of these together, as one process would take it. Resume with as many as before.

    Returns
    -------
    TrainingModule
        After its last step.

    Raises
    ------
    ConfigError
        If the configuration given to a resumed run differs from its own.
    FileExistsError
        If `output` holds a run and `resume` is False.
    CheckpointError, DataError
        For unusable checkpoints and data.
    """
    kept = output / "config.yaml"
    if resume:
        if not kept.exists():
            raise CheckpointError(f"{output} holds no run to resume (no config.yaml)")
        own = read_config(kept)
        if config is not None and config != own:
            raise ConfigError(f"the configuration differs from {kept}; resume with that one, or start a new run in another directory")
        config = own
    elif rank_zero_only.rank == 0 and output.exists() and any(output.iterdir()):
        # Only the first process looks: the others start after it has written.
        raise FileExistsError(f"{output} is not empty; choose another output directory, or resume the run in it with --resume")
    if config is None:
        raise ConfigError("a new run needs a configuration")
    dataset = PackedDataset(config.data)
    lightning.seed_everything(config.run.seed, verbose=False)
    module = TrainingModule(config, dataset)
    if config.initial_model is not None and not resume:
        # The scales belong to the run that made the weights: keep them together, or the outputs would be rescaled.
        start = initial_weights(config.initial_model, config.network)
        module.network.load_state_dict(start)
        module.ema.module.load_state_dict(start)
    output.mkdir(parents=True, exist_ok=True)
    kept.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))

    run = config.run
    has_validation = len(dataset.indices("validation")) > 0
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*pre-optimization state.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*that has no length.*|.*no `__len__`.*")
    warnings.filterwarnings("ignore", ".*ModelCheckpoint.*exists and is not empty.*|.*Checkpoint directory.*")
    callbacks: list[lightning.Callback] = [
        CsvLog(output / "log.csv", run.log_every),
        ProgressDisplay(run.log_every),
        ModelCheckpoint(output, filename="last", every_n_train_steps=run.checkpoint_every, save_top_k=1, enable_version_counter=False),
    ]
    if has_validation:
        callbacks.append(
            ModelCheckpoint(
                output, filename="best", monitor="validation_error", save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=False
            )
        )
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        use_distributed_sampler=False,  # TrainingModule cuts its batches itself, none twice
        max_steps=run.max_steps,
        val_check_interval=run.validate_every if has_validation else None,
        check_val_every_n_epoch=None if has_validation else 1,
        limit_val_batches=None if has_validation else 0,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        plugins=[SafeCheckpointIO()],
        inference_mode=False,
    )
    last = output / LAST
    trainer.fit(module, ckpt_path=str(last) if resume and last.exists() else None, weights_only=True)
    trainer.save_checkpoint(last)
    return module
