"""`ablate`: variants of one run, each trained for the same steps on the same batches, side by side."""

import json
from pathlib import Path
from typing import Any

import yaml

from training.checkpoint import load_checkpoint
from training.config import ConfigError, FitConfig, parse_config
from training.fit import fit
from training.run import LAST, is_begun
from training.sweep import last_validation


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, section by section."""
    out = dict(base)
    for key, value in changes.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def _folder(variant: str) -> str:
    return variant.replace(" ", "-")


def read_ablation(path: Path) -> dict[str, FitConfig]:
    """Read variants from a YAML file with ``base``, a configuration of `fit`, and ``variants``, by name what each changes in it.

    Raises
    ------
    ConfigError
        If it cannot be read or is no such file, and for variants that are no configuration of `fit`, or would train for other steps than the base.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from None
    if not isinstance(raw, dict) or set(raw) != {"base", "variants"} or not all(isinstance(part, dict) for part in raw.values()):
        raise ConfigError(f"{path}: expected the two sections base and variants; see training/configs/ablation")
    strange = [name for name, changes in raw["variants"].items() if not isinstance(name, str) or not isinstance(changes, dict | None)]
    if strange:
        raise ConfigError(f"{path}: each variant is a name and what it changes, section by section; {strange[0]!r} is not")
    folders = [_folder(name) for name in raw["variants"]]
    if len(set(folders)) < len(folders):
        raise ConfigError(f"{path}: variants must differ in more than spaces and hyphens, got {', '.join(raw['variants'])}")
    variants = {name: parse_config(merged(raw["base"], changes or {}), f"{path}, {name}") for name, changes in raw["variants"].items()}
    if not variants:
        raise ConfigError(f"{path}: variants is empty; name at least one")
    steps = {name: config.run.max_steps for name, config in variants.items()}
    if len(set(steps.values())) > 1:
        raise ConfigError(f"{path}: variants must train for equal steps to be compared, got {steps}")
    return variants


def ablate(variants: dict[str, FitConfig], output: Path, **trainer: Any) -> list[dict[str, Any]]:
    """Train every variant; runs in `output` that were interrupted go on, finished ones are kept.

    Parameters
    ----------
    variants : dict
        Name to configuration.
    output : Path
        Directory; each run gets its own inside, ``ablation.json`` appears at the end.
    **trainer
        ``accelerator`` and ``devices`` of `fit`.

    Returns
    -------
    list of dict
        Per variant its name, number of parameters, steps, and the errors of the last validation, kcal/mol and kcal/mol/Angstrom.

    Raises
    ------
    ConfigError, DataError, CheckpointError, FileExistsError, NotADirectoryError, NonFiniteTraining, TrainingStopped
        As `fit`.
    ValueError
        If a run was never validated.
    """
    table = []
    for name, config in variants.items():
        run = output / _folder(name)
        fit(config, run, resume=is_begun(run), **trainer)
        parameters = sum(p.numel() for p in load_checkpoint(run / LAST).network.parameters())
        table.append({"variant": name, "parameters": parameters, **last_validation(run / "log.csv", config.loss)})
    (output / "ablation.json").write_text(json.dumps(table, indent=1) + "\n")
    return table
