"""Published benchmarks of one molecule each: prepare, train, evaluate and export by one command; give it again to go on.

    python -m benchmarks.accuracy.run 3bpa DATA_FOLDER --output runs/3bpa
    python -m benchmarks.accuracy.run acac DATA_FOLDER --output runs/acac --from-scratch --seed 1

DATA_FOLDER holds the extended XYZ files under the names that `SETS` below lists, as in the BOTNet data repository. Training starts from
se3-ani1x, or from random weights with ``--from-scratch``. `results.json` in the output has the errors and the published ones beside; NAME.pt
there is the model for simulations, NAME.ckpt its weights alone.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from training.align import ModelReference
from training.checkpoint import load_checkpoint, weights_alone
from training.config import FitConfig, read_config
from training.data.prepare import prepare
from training.evaluate import evaluate
from training.export import export
from training.fit import LAST, fit

CONFIGS = Path(__file__).parent / "configs"
#: Split of a set must not differ between the runs that are compared.
SPLIT_SEED = 0


@dataclass(frozen=True)
class BenchmarkSet:
    """Files and published errors of a set.

    Attributes
    ----------
    train : str
        File to train on.
    validation, test : float
        Fractions of its frames that choose the weights, and that nothing but the final test sees.
    others : dict
        What is tested on besides, by name of the row.
    level_of_theory : str
        Of its labels.
    published : dict
        Row to method to RMSE of energy (meV) and force (meV/Angstrom).
    """

    train: str
    validation: float
    test: float
    others: dict[str, str]
    level_of_theory: str
    published: dict[str, dict[str, tuple[float, float]]]


SETS = {
    # Kovacs et al., J. Chem. Theory Comput. 17, 7696 (2021); Batatia et al., NeurIPS (2022); Musaelian et al., Nat. Commun. 14, 579 (2023).
    "3bpa": BenchmarkSet(
        train="train_300K.xyz",
        validation=0.06,
        test=0.1,
        others={"600 K": "test_600K.xyz"},
        level_of_theory="wB97X/6-31G(d)",
        published={
            "300 K": {"linear ACE": (7.1, 27.1), "Allegro": (3.84, 12.98), "MACE": (3.0, 8.8)},
            "600 K": {"linear ACE": (24.0, 64.3), "Allegro": (12.07, 29.11), "MACE": (9.7, 21.8)},
        },
    ),
    # Batatia et al., NeurIPS (2022), Table 3.
    "acac": BenchmarkSet(
        train="train_300K.xyz",
        validation=0.1,
        test=0.0,
        others={"300 K": "test_MD_300K.xyz"},
        level_of_theory="PBE+D3/def2-SVP",
        published={"300 K": {"BOTNet": (0.89, 6.3), "NequIP": (0.81, 5.90), "MACE": (0.9, 5.1)}},
    ),
}


def prepared(which: BenchmarkSet, folder: Path, output: Path, initial_model: str | None) -> Path:
    """The packed data set; energies relative to the references of the model to start from, if there is one."""
    packed = output / "packed"
    if not packed.exists():
        prepare(
            [folder / which.train],
            packed,
            split_by="frame",
            validation=which.validation,
            test=which.test,
            seed=SPLIT_SEED,
            align_to=None if initial_model is None else ModelReference(initial_model),
        )
    return packed


def require_same(output: Path, asked: dict[str, Any]) -> None:
    """Keep what the results in a folder are of, and refuse to mix others with them."""
    file = output / "asked.json"
    output.mkdir(parents=True, exist_ok=True)
    if file.exists() and json.loads(file.read_text()) != asked:
        raise SystemExit(f"{output} has results of {file.read_text().strip()}, not of {json.dumps(asked)}; choose another --output")
    file.write_text(json.dumps(asked) + "\n")


def stage(name: str, packed: Path, arguments: argparse.Namespace, initial_model: str | None) -> Path:
    """Train one stage, or go on with it; the checkpoint that the validation frames chose."""
    config = read_config(CONFIGS / f"{name}.yaml")
    steps = arguments.steps or config.run.max_steps
    changes = {"seed": arguments.seed, "max_steps": steps, "validate_every": min(config.run.validate_every, steps)}
    run = config.run.model_copy(update=changes)
    config = FitConfig.model_validate({**config.model_dump(), "data": str(packed), "initial_model": initial_model, "run": run.model_dump()})
    directory = arguments.output / name
    fit(config, directory, resume=(directory / LAST).exists())  # of a finished run it leaves everything as it is
    return directory / "best.ckpt"


def errors(checkpoint: Path, which: BenchmarkSet, packed: Path, folder: Path, output: Path) -> dict[str, Any]:
    """RMSE by row: energy (meV), conservative and direct force (meV/Angstrom), frames."""
    tests: dict[str, tuple[Path, str]] = {"300 K": (packed, "test")} if which.test else {}
    tests |= {row: (folder / name, "all") for row, name in which.others.items()}
    rows = {}
    for row, (data, split) in tests.items():
        where = output / f"test {row}"
        if not (where / "metrics.json").exists():
            evaluate(str(checkpoint), data, split=split, output=where)
        found = json.loads((where / "metrics.json").read_text())
        rows[row] = {
            "energy_rmse_mev": found["energy_rmse_mev"],
            "conservative_force_rmse_mev_per_angstrom": found["conservative_force_rmse_mev_per_angstrom"],
            "direct_force_rmse_mev_per_angstrom": found["force_rmse_mev_per_angstrom"],
            "n_frames": found["n_frames"],
        }
    return rows


def results_table(name: str, rows: dict[str, Any], published: dict[str, dict[str, tuple[float, float]]]) -> Table:
    """Our errors and the published ones."""
    table = Table("test", "method", "energy (meV)", "force (meV/Å)", title=f"{name}: RMSE")
    for row, found in rows.items():
        energy = f"{found['energy_rmse_mev']:.1f}"
        test = f"{row}, {found['n_frames']} frames"
        table.add_row(test, "this run, conservative", energy, f"{found['conservative_force_rmse_mev_per_angstrom']:.1f}")
        table.add_row("", "this run, direct", "", f"{found['direct_force_rmse_mev_per_angstrom']:.1f}")
        for method, (e, f) in published.get(row, {}).items():
            table.add_row("", f"{method} (published)", f"{e:g}", f"{f:g}")
    return table


def main(argv: list[str] | None = None) -> None:
    """Run what is not yet there, print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("set", choices=sorted(SETS))
    parser.add_argument("folder", type=Path, help="where the set's files are")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--initial-model", default="se3-ani1x")
    parser.add_argument("--from-scratch", action="store_true", help="random weights instead, direct forces first")
    parser.add_argument("--steps", type=int, help="of each stage; by default those of the configurations")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches; the split stays")
    arguments = parser.parse_args(argv)
    which = SETS[arguments.set]
    initial = None if arguments.from_scratch else arguments.initial_model
    require_same(arguments.output, {"set": arguments.set, "initial_model": initial, "steps": arguments.steps, "seed": arguments.seed})
    packed = prepared(which, arguments.folder, arguments.output, initial)
    if arguments.from_scratch:
        direct = stage("scratch-1-direct", packed, arguments, None)
        best = stage("scratch-2-conservative", packed, arguments, str(direct))
    else:
        best = stage("finetune", packed, arguments, initial)
    rows = errors(best, which, packed, arguments.folder, arguments.output)
    name = f"{arguments.set}{'-scratch' if arguments.from_scratch else ''}-seed{arguments.seed}"
    weights_alone(best, arguments.output / f"{name}.ckpt")
    steps = load_checkpoint(best.with_name(LAST)).step
    results = {
        "set": arguments.set,
        "from": None if initial is None else Path(initial).stem,
        "seed": arguments.seed,
        "steps": steps,
        "rmse": rows,
        "published": which.published,
    }
    (arguments.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    Console().print(results_table(arguments.set, rows, which.published))
    model = arguments.output / f"{name}.pt"
    if not model.exists():
        export(best, model, level_of_theory=which.level_of_theory, licence="MIT", metrics=rows)


if __name__ == "__main__":
    main()
