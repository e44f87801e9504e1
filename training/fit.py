"""`fit`: configuration and packed data in, a directory with checkpoints, log and learning curves out."""

from pathlib import Path

import lightning
import numpy as np

from training.callbacks import CsvLog, ProgressDisplay, plot_learning_curves
from training.checkpoint import initial_weights
from training.config import ConfigError, FitConfig, read_config
from training.data.packed import PackedDataset
from training.evaluate import open_model
from training.loss import predict
from training.module import TrainingModule
from training.run import LAST, configuration_of_run, train

#: Training frames on which a start model's energies are compared with the labels.
COMPARED_FRAMES = 20
#: eV per atom. Models of one level of theory, relative to other fitted self-energies, are within some tenths; free atoms are several eV away.
MAX_OFFSET = 0.5


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
        See `training.run.train`. With more than one device there is a process for each; every one takes batches of its own, and a
        step is that of all of these together, as one process would take it. A run is resumed with as many as before.

    Returns
    -------
    TrainingModule
        After its last step.

    Raises
    ------
    ConfigError
        If the configuration given to a resumed run differs from its own, if the loss weighs forces that the data lack, if the start model is another
        network or its energies are far from the labels, or if the machine lacks the hardware or a compiler.
    FileExistsError
        If `output` holds a run and `resume` is False, or another process trains there.
    NotADirectoryError
        If `output` is a file.
    CheckpointError, DataError
        For unusable checkpoints and data; the first also for an unusable start model, and if no checkpoint can be written.
    NonFiniteTraining
        If the weights diverge.
    TrainingStopped
        After SIGTERM or SIGINT; the run can be resumed.
    """
    config = configuration_of_run(config, output, resume, read_config)
    dataset = PackedDataset(config.data)
    lightning.seed_everything(config.run.seed, verbose=False)
    module = TrainingModule(config, dataset)
    if not (resume and (output / LAST).exists()):
        _require_labels(config, dataset)
        if config.initial_model is not None:
            _start_from(config.initial_model, module)
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


def _require_labels(config: FitConfig, dataset: PackedDataset) -> None:
    """Refuse weights of forces where the data have none: the direct forces would stay those of random weights."""
    weighted = {k: w for k in ("force_weight", "conservative_weight") if (w := getattr(config.loss, k)) > 0}
    if dataset.forces is None and weighted:
        listed = ", ".join(f"loss.{k} is {w:g}" for k, w in weighted.items())
        raise ConfigError(f"{config.data} has no forces to train on, but {listed}; set to 0 to train on energies alone, or prepare data with forces")


def _start_from(name: str, module: TrainingModule) -> None:
    """Give a module the weights of a trained model, and its self-energies of the elements that the data lack."""
    # The scales belong to the run that made the weights: keep them together, or the outputs would be rescaled.
    start = initial_weights(name, module.config.network)
    module.network.load_state_dict(start)
    module.ema.module.load_state_dict(start)
    module.self_energies = {s: e for s, e in open_model(name).self_energies.items() if s in module.config.network.elements} | module.self_energies
    if module.config.loss.energy_weight > 0:
        _check_offset(name, module)


def _check_offset(name: str, module: TrainingModule) -> None:
    """Refuse a start model whose energies are far from the labels: it would spend its training on the difference of two references."""
    frames = module.dataset.indices("train")
    frames = frames[np.linspace(0, len(frames) - 1, min(COMPARED_FRAMES, len(frames))).astype(int)]
    offsets = []
    for frame in frames:
        batch = module.collate(np.array([frame]))
        energies, _, _ = predict(module.network, batch, False, create_graph=False)
        offsets.append(float((energies.detach() - batch.energies) / batch.n_atoms_of))
    offset = float(np.mean(offsets)) if offsets else 0.0
    if abs(offset) > MAX_OFFSET:
        raise ConfigError(
            f"initial_model: the energies of {name} differ from those of {module.config.data} by {offset:+.2f} eV per atom (mean of "
            f"{len(offsets)} training frames), more than {MAX_OFFSET}: they are relative to other self-energies. Prepare the data again with "
            f"--align-to {name}"
        )
