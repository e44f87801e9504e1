"""`sweep`: the same run with several energy weights, side by side (the thesis went through 1e-2 to 1e-6)."""

import json
from pathlib import Path
from typing import Any

from training.callbacks import read_log
from training.config import FitConfig, LossConfig, parse_config
from training.fit import fit
from training.run import is_begun

THESIS_WEIGHTS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def sweep(config: FitConfig, output: Path, energy_weights: tuple[float, ...] = THESIS_WEIGHTS, **trainer: Any) -> list[dict[str, float]]:
    """Train once per energy weight; runs in `output` that were interrupted go on, finished ones are kept.

    Parameters
    ----------
    config : FitConfig
        The run; its energy weight is replaced.
    output : Path
        Directory; each run gets its own inside, ``sweep.json`` and ``sweep.png`` appear at the end.
    energy_weights : tuple of float
        Weights of the energy in the loss.
    **trainer
        ``accelerator`` and ``devices`` of `fit`.

    Returns
    -------
    list of dict
        Per weight the step and the errors of the last validation, kcal/mol and kcal/mol/Angstrom.

    Raises
    ------
    ConfigError, DataError, CheckpointError, FileExistsError, NotADirectoryError, NonFiniteTraining, TrainingStopped
        As `fit`.
    ValueError
        If there is no weight, or a run was never validated.
    """
    if not energy_weights:
        raise ValueError("energy_weights must hold at least one number, got none")
    table = []
    for weight in energy_weights:
        raw = config.model_dump(mode="json")
        raw["loss"]["energy_weight"] = weight
        run = output / f"energy-weight-{weight:g}"
        fit(parse_config(raw, f"energy weight {weight:g}"), run, resume=is_begun(run), **trainer)
        table.append({"energy_weight": weight, **last_validation(run / "log.csv", config.loss)})
    output.mkdir(parents=True, exist_ok=True)
    (output / "sweep.json").write_text(json.dumps(table, indent=1) + "\n")
    _plot(table, output / "sweep.png")
    return table


def last_validation(log: Path, loss: LossConfig) -> dict[str, float]:
    """Step and errors, kcal/mol and kcal/mol/Angstrom, of the last validation in the log of a run; of forces, of those that `loss` trains."""
    rows = [row for row in read_log(log) if row["validation_energy_rmse"]]
    if not rows:
        raise ValueError(f"{log} holds no validation errors; lower run.validate_every, or prepare the data with a validation split")
    names = tuple(f"validation_{quantity}_" for quantity in ("energy", *loss.forces))
    errors = {k: float(v) for k, v in rows[-1].items() if k.startswith(names) and v}
    return {"step": int(rows[-1]["step"]), **errors}


def _plot(table: list[dict[str, float]], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axis = figure.subplots()
    for key, label in (
        ("validation_energy_rmse", "energy (kcal/mol)"),
        ("validation_force_rmse", "direct force (kcal/mol/Å)"),
        ("validation_conservative_force_rmse", "conservative force (kcal/mol/Å)"),
    ):
        points = [(row["energy_weight"], row[key]) for row in table if key in row]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
    axis.set(xlabel="energy weight in the loss", ylabel="validation RMSE", xscale="log", yscale="log")
    axis.legend()
    figure.savefig(picture, dpi=130)
