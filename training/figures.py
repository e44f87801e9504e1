"""`figures`: counterparts of the thesis' tables and learning curves, from directories of runs and from nothing else.

Table 3.1: energies before and after subtracting self-energies, from the statistics of the data that a run trained on. Table 3.2: errors of
the trained networks. Figures 3.2 to 3.7: errors of energies and forces while training. The thesis' own numbers stand beside ours, marked as
what they are: read off its training curves, on other data; ours are on held-out formulas.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.callbacks import read_log
from training.checkpoint import CheckpointError, load_checkpoint
from training.config import FitConfig, read_config
from training.run import LAST
from training.units import KCAL_PER_MOL_PER_EV

#: What the thesis prints: kcal/mol and kcal/mol/Angstrom, training errors.
PRINTED = (
    {"run": "thesis: basic (2 channels)", "energy": 3.211, "force": 4.104},
    {"run": "thesis: wider (4 channels)", "energy": 3.305, "force": 4.339},
    {"run": "thesis: higher order (4 channels, degrees to 3)", "energy": 5.459, "force": 6.294},
    {"run": "thesis: ANI-1, energies alone", "energy": 3.802, "force": None},
)
_QUANTITIES = {"energy": "energy RMSE (kcal/mol)", "force": "force RMSE (kcal/mol/Å)"}


@dataclass
class Run:
    """One directory of `fit`.

    Attributes
    ----------
    name : str
        Of the directory.
    config : FitConfig
        Its configuration.
    data : dict
        Metadata of the data that it trained on.
    n_parameters, step : int
        Trained numbers, and optimizer steps at its last checkpoint.
    rows : list of dict
        Its log.
    """

    name: str
    config: FitConfig
    data: dict[str, Any]
    n_parameters: int
    step: int
    rows: list[dict[str, str]]

    def points(self, column: str) -> list[tuple[int, float]]:
        """Steps and values of a column of the log, where it has some."""
        return [(int(row["step"]), float(row[column])) for row in self.rows if row.get(column)]


def read_run(directory: Path) -> Run:
    """Read a directory of `fit`.

    Raises
    ------
    CheckpointError
        If a file is missing or damaged.
    ConfigError
        If its configuration cannot be read.
    """
    missing = [name for name in ("config.yaml", "log.csv", LAST) if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(f"{directory} is no directory of 'python -m training fit': it lacks {', '.join(missing)}")
    loaded = load_checkpoint(directory / LAST)
    n_parameters = sum(p.numel() for p in loaded.network.parameters())
    return Run(directory.name, read_config(directory / "config.yaml"), loaded.data, n_parameters, loaded.step, read_log(directory / "log.csv"))


def figures(directories: list[Path], output: Path) -> list[Path]:
    """Make tables and figures.

    Parameters
    ----------
    directories : list of Path
        Of runs; their names name the rows and the pictures.
    output : Path
        Directory for ``table_3_1``, ``table_3_2`` (each ``.md`` and ``.json``) and, for each run, ``RUN-energy.png`` and ``RUN-force.png``.
        Files of these names are replaced: what is drawn changes while a run goes on.

    Returns
    -------
    list of Path
        The files made.

    Raises
    ------
    CheckpointError, ConfigError
        As `read_run`.
    ValueError
        If no directory is given, or two of one name.
    """
    names = [d.resolve().name for d in directories]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"the directories of runs must be at least one, and of different names, got {', '.join(names) or 'none'}")
    runs = [read_run(d.resolve()) for d in directories]
    output.mkdir(parents=True, exist_ok=True)
    made = _write_table(output / "table_3_1", energy_statistics(runs), "Energies before and after subtracting self-energies, kcal/mol")
    caption = (
        f"Errors of the networks, kcal/mol and kcal/mol/Å. Of runs: RMSE on the validation split, {_held_out(runs)} held out from training, "
        "at the best of the validations, and the mean over the last 20 training batches in the log. Of the thesis: as printed, training errors "
        "on other data; not comparable as they stand"
    )
    made += _write_table(output / "table_3_2", error_table(runs), caption)
    for run in runs:
        for quantity in list(_QUANTITIES) if run.config.loss.forces else ["energy"]:
            picture = plot_errors(run, quantity, output / f"{run.name}-{quantity}.png")
            made += [picture] if picture else []
    return made


def _held_out(runs: list[Run]) -> str:
    """What the validation splits hold: of a split by frame, or by files, formulas may be those trained on."""
    by_frame = {run.data.get("split_by") == "frame" or bool((run.data.get("split_files") or {}).get("validation")) for run in runs}
    return " or ".join("frames" if frames else "formulas" for frames in sorted(by_frame))


def energy_statistics(runs: list[Run]) -> list[dict[str, Any]]:
    """Rows of the counterpart of Table 3.1: one for each data set that a run trained on, kcal/mol."""
    rows = {}
    for run in runs:
        row: dict[str, Any] = {"data": ", ".join(run.data["sources"]), "self-energies": run.data["self_energies_origin"]}
        for label, key in (("total", "total"), ("without self-energies", "residual"), ("the same per atom", "residual_per_atom")):
            for statistic in ("mean", "std"):
                row[f"{label}, {statistic}"] = run.data["statistics"][key][statistic] * KCAL_PER_MOL_PER_EV
        rows[run.data["sha256"]] = row
    return list(rows.values())


def error_table(runs: list[Run]) -> list[dict[str, Any]]:
    """Rows of the counterpart of Table 3.2: of ``force``, the direct one, and ``conservative force`` those that were trained on.

    The best validation is that of the quantity by which `fit` chooses ``best.ckpt``.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        forces = run.config.loss.forces
        columns = [f"validation_{quantity}_rmse" for quantity in (*forces, "energy")]
        chosen_by = next((column for column in columns if run.points(column)), None)
        best = None if chosen_by is None else min(run.points(chosen_by), key=lambda point: point[1])[0]
        row: dict[str, Any] = {
            "run": run.name,
            "parameters": run.n_parameters,
            "steps": run.step,
            "energy weight": run.config.loss.energy_weight,
            "best at step": best,
        }
        for quantity in ("energy", *reversed(forces)):
            name = quantity.replace("_", " ")
            row[f"{name}, validation"] = dict(run.points(f"validation_{quantity}_rmse")).get(best) if best is not None else None
            last = run.points(f"train_{quantity}_rmse")[-20:]
            row[f"{name}, training"] = sum(v for _, v in last) / len(last) if last else None
        rows.append(row)
    return rows + [{"run": p["run"], "energy, training": p["energy"], "force, training": p["force"]} for p in PRINTED]


def _write_table(stem: Path, rows: list[dict[str, Any]], caption: str) -> list[Path]:
    """Write rows as JSON and as a Markdown table."""

    def shown(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}" if isinstance(value, float) and abs(value) >= 1e-2 else str(value)

    columns = list(dict.fromkeys(k for row in rows for k in row))
    lines = [f"{caption}.", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(shown(row.get(c)) for c in columns) + " |" for row in rows]
    text, data = stem.with_suffix(".md"), stem.with_suffix(".json")
    text.write_text("\n".join(lines) + "\n")
    data.write_text(json.dumps({"caption": caption, "rows": rows}, indent=1) + "\n")
    return [text, data]


def plot_errors(run: Run, quantity: str, picture: Path) -> Path | None:
    """Draw training and validation errors of ``energy`` or ``force`` over the steps, and where the learning rate drops; None without any."""
    from matplotlib.figure import Figure

    kinds = tuple(reversed(run.config.loss.forces)) if quantity == "force" else (quantity,)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for color, kind in enumerate(kinds):
        name = kind.replace("_", " ")
        for split, style in (("train", {"alpha": 0.4, "lw": 0.8}), ("validation", {"marker": "o", "ms": 3})):
            points = run.points(f"{split}_{kind}_rmse")
            if points:
                axis.plot(*zip(*points, strict=True), color=f"C{color}", label=f"{name}, {split}", **style)
    if not axis.lines:
        return None
    if run.config.optimizer.schedule == "steps":
        for milestone in run.config.optimizer.milestones:
            if milestone <= run.step:
                axis.axvline(milestone, color="grey", ls=":", lw=0.8)
    axis.set(xlabel="optimizer step", ylabel=_QUANTITIES[quantity], title=run.name, yscale="log")
    axis.legend()
    figure.savefig(picture, dpi=130)
    return picture
