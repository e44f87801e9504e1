"""What a run leaves behind while it goes: a CSV log, a learning-curve picture, a progress bar."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training.files import replacing
from training.module import TrainingModule
from training.units import KCAL_PER_MOL_PER_EV

COLUMNS = (
    "step",
    "learning_rate",
    "gradient_norm",
    "loss",
    "train_energy_rmse",
    "train_force_rmse",
    "train_conservative_force_rmse",
    "validation_energy_rmse",
    "validation_energy_mae",
    "validation_force_rmse",
    "validation_force_mae",
    "validation_conservative_force_rmse",
    "bad_batches",
)


class CsvLog(lightning.Callback):
    """One row per `every` steps, and one for each validation.

    A module gives its numbers in ``latest`` and ``validation_errors``; errors among them get the prefix ``train_`` or ``validation_``. A resumed
    run drops the rows that lie after its checkpoint, so that the file reads as if never interrupted.

    Parameters
    ----------
    path : Path
        The CSV file.
    every : int
        Steps between rows; means over them are not taken, each row is one batch.
    columns : tuple of str
        What is written of all that.
    unit : float
        Factor of the errors; by default they become kcal/mol and kcal/mol/Angstrom.
    picture : callable, optional
        Draws the log, ``picture(log, learning_curves.png beside it)``, after each validation.
    """

    def __init__(
        self,
        path: Path,
        every: int,
        columns: tuple[str, ...] = COLUMNS,
        unit: float = KCAL_PER_MOL_PER_EV,
        picture: Callable[[Path, Path], None] | None = None,
    ) -> None:
        self.path, self.every, self.columns, self.unit, self.picture = path, every, columns, unit, picture
        self._last = -1

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the header, or cut the log back to the checkpoint, whose step is known from here on."""
        if not trainer.is_global_zero:
            return
        rows = [r for r in read_log(self.path) if int(r["step"]) <= trainer.global_step] if self.path.exists() else []
        with replacing(self.path) as partial, open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)

    def _errors(self, errors: dict[str, float], prefix: str) -> dict[str, float]:
        return {f"{prefix}_{k}": v * self.unit for k, v in errors.items() if f"{prefix}_{k}" in self.columns}

    def _append(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        """Log the latest batch."""
        step = trainer.global_step
        latest: dict[str, float] = pl_module.latest
        if latest and trainer.is_global_zero and step % self.every == 0 and step != self._last:
            self._last = step
            row = {k: latest[k] for k in ("learning_rate", "gradient_norm", "loss")}
            self._append({"step": step, "bad_batches": len(pl_module.bad_batches), **row, **self._errors(latest, "train")})

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Log the errors of the validation split."""
        if trainer.is_global_zero:
            self._append({"step": trainer.global_step, **self._errors(pl_module.validation_errors, "validation")})
            if self.picture is not None:
                self.picture(self.path, self.path.with_name("learning_curves.png"))


def read_log(path: Path) -> list[dict[str, str]]:
    """Rows of a log; a last line that a kill cut short is left out."""
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if row["step"] and None not in row.values()]


def plot_learning_curves(log: Path, picture: Path) -> None:
    """Draw training and validation errors over the steps of a log."""
    from matplotlib.figure import Figure

    rows = read_log(log)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    panels = (("energy", "energy RMSE (kcal/mol)", ("energy_rmse",)), ("force", "force RMSE (kcal/mol/Å)", ("force_rmse", "conservative_force_rmse")))
    for axis, (_, label, keys) in zip(axes, panels, strict=True):
        for key in keys:
            for split, style in (("train", {"alpha": 0.35, "lw": 0.8}), ("validation", {"marker": "o", "ms": 3})):
                points = [(int(r["step"]), float(r[f"{split}_{key}"])) for r in rows if r.get(f"{split}_{key}")]
                if points:
                    axis.plot(*zip(*points, strict=True), label=f"{split}, {key.removesuffix('_rmse').replace('_', ' ')}", **style)
        axis.set(xlabel="optimizer step", ylabel=label)
        if axis.lines:
            axis.set_yscale("log")
            axis.legend()
    with replacing(picture) as partial:
        figure.savefig(partial, dpi=130)


class ProgressDisplay(lightning.Callback):
    """Progress bar with time left on a terminal; a line every `every` steps elsewhere.

    Parameters
    ----------
    every : int
        Steps between lines where there is no terminal.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.console = Console()
        self._bar: Progress | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the bar."""
        if trainer.is_global_zero:
            text = TextColumn("{task.description}")
            self._bar = Progress(text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
            self._task = self._bar.add_task("training", total=trainer.max_steps, completed=trainer.global_step)
            if self.console.is_terminal:
                self._bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """Advance the bar."""
        if self._bar is None or not isinstance(pl_module, TrainingModule):
            return
        errors = "  ".join(f"{k} {v * KCAL_PER_MOL_PER_EV:.2f}" for k, v in pl_module.latest.items() if k in ("energy_rmse", "force_rmse"))
        self._bar.update(self._task, completed=trainer.global_step, description=f"{errors} kcal/mol(/Å)")
        if not self.console.is_terminal and trainer.global_step % self.every == 0:
            left = self._bar.tasks[0].time_remaining
            self.console.print(f"step {trainer.global_step}/{trainer.max_steps}  {errors}  {'' if left is None else f'{left / 60:.1f} min left'}")

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
        """Take the bar away, whatever happened."""
        self.on_fit_end(trainer, pl_module)
