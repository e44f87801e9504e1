"""What `fit` and `nbody fit` share: the directory of a run, and the trainer that keeps it resumable."""

import contextlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from pydantic import BaseModel
from torch._inductor.exc import InductorError

from training.allocator import keep_freed_memory
from training.callbacks import read_log
from training.checkpoint import CheckpointError, SafeCheckpointIO
from training.config import ConfigError
from training.distributed import sum_over_ranks, world_size
from training.files import PARTIAL, replacing
from training.lock import LOCK, alone

LAST = "last.ckpt"
_CONFIG, _LOG = "config.yaml", "log.csv"

_Config = TypeVar("_Config", bound=BaseModel)


class TrainingStopped(RuntimeError):
    """A signal ended the training before its last step.

    Parameters
    ----------
    number : int
        Of the signal.
    step : int
        That of the checkpoint from which the run goes on.

    Attributes
    ----------
    exit_code : int
        What a shell expects of a process that this signal ended.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped at step {step} ({signal.Signals(number).name})")
        self.exit_code = 128 + number


def is_begun(output: Path) -> bool:
    """Whether a directory holds a run that took a step, or anything else; what a start leaves that failed, or was killed at once, does not count."""
    if not output.exists():
        return False
    log = output / _LOG
    no_rows = {_LOG} if log.is_file() and not read_log(log) else set()
    names = {p.name for p in output.iterdir() if not p.name.startswith(PARTIAL)}
    return bool(names - {_CONFIG, LOCK} - no_rows)


def configuration_of_run(config: _Config | None, output: Path, resume: bool, read: Callable[[Path], _Config]) -> _Config:
    """The configuration with which to train in a directory; a resumed run keeps its own.

    Parameters
    ----------
    config : BaseModel or None
        The one asked for; None only with `resume`. Of a resumed run it may have a larger ``max_steps``, where the learning rate does not depend
        on that: the result is then that of a run that was meant to be so long from its start.
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
    NotADirectoryError
        If `output` is a file.
    """
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file; give a directory as output")
    kept = output / _CONFIG
    if resume:
        if not kept.exists():
            raise CheckpointError(f"{output} holds no run to resume (no {_CONFIG})")
        own = read(kept)
        if config is None or config == own:
            return own
        _require_longer(config, own, output)
        return config
    if rank_zero_only.rank == 0 and is_begun(output):
        # Only the first process looks: the others start after it has written.
        raise FileExistsError(f"{output} is not empty; choose another output directory, or resume the run in it with --resume")
    if config is None:
        raise ConfigError("a new run needs a configuration")
    return config


def _require_longer(config: BaseModel, own: BaseModel, output: Path) -> None:
    """Raise ConfigError unless `config` differs from `own` by nothing but more steps, which leave the first ones as they were."""
    asked, kept = (_flat(c.model_dump(mode="json")) for c in (config, own))
    different = sorted(k for k in asked.keys() | kept.keys() if asked.get(k) != kept.get(k))
    longer = len(different) == 1 and different[0].rpartition(".")[2] == "max_steps" and asked[different[0]] > kept[different[0]]
    if longer and asked["optimizer.schedule"] == "steps":
        return
    shown = "; ".join(f"{k} was {kept.get(k)!r}, now {asked.get(k)!r}" for k in different)
    message = f"the configuration differs from {output / _CONFIG} ({shown})"
    if longer:
        raise ConfigError(
            f"{message}: the learning rate of optimizer.schedule {asked['optimizer.schedule']} fell over the {kept[different[0]]} steps of this run, "
            f"which cannot be made longer after the fact; start a new run in another directory with initial_model: {output / LAST}"
        )
    raise ConfigError(f"{message}; resume with that one, or start a new run in another directory")


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


class _Best(ModelCheckpoint):
    """Writes ``best.ckpt``; a run goes on with its best error also where its directory was moved or copied, which Lightning would forget."""

    @property
    def state_key(self) -> str:
        """Lightning's own name of its state, which checkpoints of earlier versions have."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state with the directory that the run has now, if its file came along."""
        here = Path(str(self.dirpath)) / Path(state_dict["best_model_path"]).name
        if here.is_file():
            paths = {"best_model_path": str(here), "kth_best_model_path": str(here)}
            models = {str(here): score for score in state_dict["best_k_models"].values()}
            state_dict = {**state_dict, **paths, "dirpath": self.dirpath, "best_k_models": models}
        super().load_state_dict(state_dict)


class _Progress(Checkpoint):
    """Writes ``last.ckpt``, has the last step validated, and ends the training where a signal asks for it.

    A step that is to be validated is saved after that: a run that goes on from its checkpoint would not make up for the validation.

    Parameters
    ----------
    path : Path
        The checkpoint.
    max_steps, every : int
        Optimizer steps in all, and between checkpoints.
    validate_every : int or None
        Batches between validations.
    """

    def __init__(self, path: Path, max_steps: int, every: int, validate_every: int | None) -> None:
        self.path, self.max_steps, self.every, self.validate_every = path, max_steps, every, validate_every
        self.saved = 0
        self.signal = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Listen; Lightning puts the former handlers back at the end."""
        self.saved = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) != signal.SIG_IGN:  # as a shell has it for what runs in the background
                    signal.signal(number, self._ask)

    def _ask(self, number: int, _: Any) -> None:
        self.signal = number
        os.write(2, b"\nstopping after this step, or the validation that has begun; once more to stop at once\n")
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        """Save, if it is time and no validation is to come."""
        if trainer.global_step >= self.max_steps:
            trainer.should_stop = True  # has Lightning validate, whatever the interval
        validated = self.validate_every is not None and (trainer.should_stop or pl_module.batches_seen % self.validate_every == 0)
        if not validated:
            self._step_is_done(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save, if it is time."""
        self._step_is_done(trainer, pl_module)

    def _step_is_done(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        step = trainer.global_step
        asked = self.signal or (signal.SIGTERM if trainer.received_sigterm else 0)  # by Lightning's handler, before this one listened
        if world_size() > 1:  # all processes stop after the same step
            told = int(sum_over_ranks(torch.tensor(float(asked), device=pl_module.device)))
            asked = asked or (signal.SIGTERM if told else 0)
        if step != self.saved and (asked or step % self.every == 0 or step >= self.max_steps):
            trainer.save_checkpoint(self.path)
            self.saved = step
        if asked and step < self.max_steps:
            raise TrainingStopped(asked, step)


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """Keep Lightning from saying what holds of every run here; what a caller has set comes back."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.*")
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*that has no length.*|.*no `__len__`.*")
            warnings.filterwarnings("ignore", ".*ModelCheckpoint.*exists and is not empty.*|.*Checkpoint directory.*")
            warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint.*")  # runs that an earlier version began
            yield
    finally:
        logger.setLevel(level)


@_without_notices()
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
    accelerator: str,
    **hardware: Any,
) -> None:
    """Train a module to its last step; a kill at any instant leaves a directory that can be resumed.

    Parameters
    ----------
    module : LightningModule
        Whose stream of batches, counted in ``batches_seen``, goes on where its checkpoint stood.
    config : BaseModel
        Kept as ``config.yaml``.
    output : Path
        Directory of the run: ``last.ckpt``, ``best.ckpt`` and what `callbacks` write.
    resume : bool
        Whether to start from ``last.ckpt``, if there is one.
    max_steps, checkpoint_every : int
        Optimizer steps in all, and between checkpoints.
    validate_every : int or None
        Steps between validations, of which there is one at the end besides; None for no validation, and no ``best.ckpt``.
    monitored : str
        The logged error by which ``best.ckpt`` is chosen.
    callbacks : list of Callback
        Further ones.
    accelerator : str
        As `lightning.Trainer` takes it, but for ``auto`` and ``gpu``: an Apple GPU, which that would choose, has no float64.
    **hardware
        Handed to `lightning.Trainer`.

    Raises
    ------
    CheckpointError
        If a checkpoint cannot be read or written.
    ConfigError
        If the machine lacks the hardware.
    FileExistsError
        If another process trains in `output`.
    TrainingStopped
        After SIGTERM or SIGINT.
    """
    last = output / LAST
    progress = _Progress(last, max_steps, checkpoint_every, validate_every)
    callbacks = [*callbacks]
    if validate_every is not None:
        best = _Best(output, filename="best", monitor=monitored, save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=False)
        callbacks.append(best)
    try:
        trainer = lightning.Trainer(
            max_steps=max_steps,
            val_check_interval=validate_every,
            check_val_every_n_epoch=1 if validate_every is None else None,
            limit_val_batches=0 if validate_every is None else None,
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*callbacks, progress],  # after `best`, whose score belongs into what it saves
            plugins=[SafeCheckpointIO()],
            inference_mode=False,
            accelerator={"auto": "cuda" if torch.cuda.is_available() else "cpu", "gpu": "cuda"}.get(accelerator, accelerator),
            **hardware,
        )
    except (MisconfigurationException, TypeError) as error:
        asked = ", ".join([f"accelerator {accelerator}", *(f"{k} {v}" for k, v in hardware.items() if k in ("devices", "num_nodes"))])
        raise ConfigError(f"this machine cannot train with {asked}: {' '.join(str(error).split())}") from None
    if isinstance(trainer.accelerator, CPUAccelerator):
        keep_freed_memory()
    first = rank_zero_only.rank == 0
    output.mkdir(parents=True, exist_ok=True)
    with alone(output, f"another process trains in {output}") if first else contextlib.nullcontext():
        if first:
            with replacing(output / _CONFIG) as partial:
                partial.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        try:
            trainer.fit(module, ckpt_path=str(last) if resume and last.exists() else None, weights_only=True)
        except InductorError as error:
            if "InvalidCxxCompiler" not in str(error):
                raise
            raise ConfigError("run.compile needs a C++ compiler, and none works here; install one (g++), or set run.compile to false") from error
        except SystemExit:  # Lightning's, of a signal before the first step, or of a second one
            raise TrainingStopped(progress.signal or (signal.SIGTERM if trainer.received_sigterm else signal.SIGINT), progress.saved) from None
