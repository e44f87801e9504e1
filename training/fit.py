"""`fit`: configuration and packed data in, a directory with checkpoints, log and learning curves out."""

from pathlib import Path

import lightning

from training.callbacks import CsvLog, ProgressDisplay, plot_learning_curves
from training.checkpoint import initial_weights
from training.config import FitConfig, read_config
from training.data.packed import PackedDataset
from training.module import TrainingModule
from training.run import LAST, configuration_of_run, train


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
    config = configuration_of_run(config, output, resume, read_config)
    dataset = PackedDataset(config.data)
    lightning.seed_everything(config.run.seed, verbose=False)
    module = TrainingModule(config, dataset)
    if config.initial_model is not None and not (resume and (output / LAST).exists()):
        # The scales belong to the run that made the weights: keep them together, or the outputs would be rescaled.
        start = initial_weights(config.initial_model, config.network)
        module.network.load_state_dict(start)
        module.ema.module.load_state_dict(start)
    run = config.run
    train(
        module,
        config,
        output,
        resume,
        max_steps=run.max_steps,
        checkpoint_every=run.checkpoint_every,
        validate_every=run.validate_every if len(dataset.indices("validation")) > 0 else None,
        monitored="validation_error",
        callbacks=[CsvLog(output / "log.csv", run.log_every, picture=plot_learning_curves), ProgressDisplay(run.log_every)],
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        use_distributed_sampler=False,  # TrainingModule cuts its batches itself, none twice
    )
    return module
