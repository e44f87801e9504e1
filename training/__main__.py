"""``python -m training prepare | fit | sweep | evaluate | export | label | figures | nbody``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from openmm_se3.errors import ModelFileError
from training.checkpoint import CheckpointError
from training.config import ConfigError
from training.data.frames import DataError
from training.nbody.commands import app as nbody_app

if TYPE_CHECKING:
    from training.run import TrainingStopped

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train SE(3)-Transformers for openmm-se3.", pretty_exceptions_enable=False)
app.add_typer(nbody_app, name="nbody")
console = Console()

_EXPECTED = (DataError, ConfigError, CheckpointError, ModelFileError, OSError, ValueError)

LayoutOption = Annotated[str, typer.Option(help="auto, ani1x, ani1 or extxyz.")]
EnergyKeyOption = Annotated[str | None, typer.Option(help="Data set or info entry with the energies; by default that of the layout.")]
ForceKeyOption = Annotated[str | None, typer.Option(help="Data set or array with the forces.")]
EnergyUnitOption = Annotated[str | None, typer.Option(help="Such as Hartree, eV, kcal/mol; by default that of the layout.")]
ForceUnitOption = Annotated[str | None, typer.Option(help="Such as Hartree/Angstrom.")]
EnergiesOnlyOption = Annotated[bool, typer.Option("--energies-only", help="Leave forces out.")]


def _fail(error: Exception) -> typer.Exit:
    if isinstance(error, OSError) and error.filename and error.strerror:
        error = OSError(f"{error.filename}: {error.strerror}; check that path, or give another")
    Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return typer.Exit(1)


def _stopped(error: "TrainingStopped", how_to_go_on: str) -> typer.Exit:
    Console(stderr=True).print(f"{error}; {how_to_go_on}", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(error.exit_code)


@app.command("prepare")
def prepare_command(
    inputs: Annotated[list[Path], typer.Argument(help="HDF5 (ANI-1x or ANI-1 layout) or extended XYZ files; named twice, a file weighs double.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")],
    layout: LayoutOption = "auto",
    energy_key: EnergyKeyOption = None,
    force_key: ForceKeyOption = None,
    energy_unit: EnergyUnitOption = None,
    force_unit: ForceUnitOption = None,
    energies_only: EnergiesOnlyOption = False,
    self_energies: Annotated[str, typer.Option(help="auto, least-squares, isolated-atoms, a JSON table, or a packed data set.")] = "auto",
    validation: Annotated[float | None, typer.Option(help="Fraction of the formulas held out to choose a model: 0.05, if no file is.")] = None,
    test: Annotated[float, typer.Option(help="Fraction of the formulas held out to test it.")] = 0.0,
    validation_data: Annotated[list[Path] | None, typer.Option(help="File to choose a model by, in place of a fraction; may be repeated.")] = None,
    test_data: Annotated[list[Path] | None, typer.Option(help="File to test it on, in place of a fraction; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    align_to: Annotated[
        str | None, typer.Option(help="Model to start from: bring the energies of all files to the level of the first, relative to its references.")
    ] = None,
    split_by: Annotated[str, typer.Option(help="formula, or, for data of a single molecule, frame.")] = "formula",
    hold_out_molecules: Annotated[
        bool,
        typer.Option(
            "--hold-out-molecules",
            help="Leave out frames that hold a molecule of a later split, alone or as one of several: of training and validation.",
        ),
    ] = False,
    level_of_theory: Annotated[str | None, typer.Option(help="Origin of the labels; by default what the files say.")] = None,
) -> None:
    """Pack data files into one memory-mapped data set."""
    from training.align import ModelReference
    from training.data.prepare import prepare
    from training.data.summary import print_summary

    try:
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
            task = bar.add_task("reading")
            dataset = prepare(
                inputs,
                output,
                layout=layout,
                energy_key=energy_key,
                force_key=force_key,
                energy_unit=energy_unit,
                force_unit=force_unit,
                energies_only=energies_only,
                self_energies=self_energies,
                validation=validation,
                test=test,
                validation_data=validation_data or (),
                test_data=test_data or (),
                seed=seed,
                split_by=split_by,
                hold_out_molecules=hold_out_molecules,
                align_to=None if align_to is None else ModelReference(align_to),
                level_of_theory=level_of_theory,
                progress=lambda name, n: bar.update(task, description=f"{name}: {n:,} frames"),
            )
            in_parts = 0
            if not hold_out_molecules:  # which has looked, and left such frames out
                bar.update(task, description="looking for tested molecules in pairs")
                in_parts = dataset.frames_tested_on_parts()
    except _EXPECTED as error:
        raise _fail(error) from None
    print_summary(dataset, in_parts, console)


@app.command("fit")
def fit_command(
    config: Annotated[Path | None, typer.Argument(help="YAML file; see training/configs.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the run.")] = Path("run"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output from its last checkpoint.")] = False,
    accelerator: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    devices: Annotated[int, typer.Option(help="Devices on each node, one process for each; a step takes a batch from every one.")] = 1,
    nodes: Annotated[int, typer.Option(help="Nodes; start the same command on each, by torchrun or srun.")] = 1,
) -> None:
    """Train a network, or continue an interrupted training."""
    from training.config import read_config
    from training.fit import fit
    from training.guard import NonFiniteTraining
    from training.run import TrainingStopped

    try:
        module = fit(None if config is None else read_config(config), output, resume, accelerator, devices, nodes)
    except TrainingStopped as stopped:
        raise _stopped(stopped, "continue with --resume") from None
    except (*_EXPECTED, NonFiniteTraining) as error:
        raise _fail(error) from None
    if not module.trainer.is_global_zero:
        return
    if module.bad_batches:
        console.print(f"{len(module.bad_batches)} molecules were in batches that were not finite and skipped; see the checkpoint", highlight=False)
    written = [name for name in ("last.ckpt", "best.ckpt", "log.csv", "learning_curves.png") if (output / name).exists()]
    console.print(f"in {output}: {', '.join(written)}", highlight=False, soft_wrap=True)


def _print_errors(first: str, names: list[tuple[str, ...]], rows: list[dict[str, Any]], *further: str) -> None:
    """Print validation errors of several runs side by side; of forces that were not trained, none."""
    columns = {
        "energy": "validation_energy_rmse",
        "direct force": "validation_force_rmse",
        "conservative force": "validation_conservative_force_rmse",
    }
    table = Table(first, *further, *columns, title="validation RMSE (kcal/mol, kcal/mol/Å)")
    for name, row in zip(names, rows, strict=True):
        table.add_row(*name, *(f"{row[key]:.3f}" if key in row else "-" for key in columns.values()))
    console.print(table)


@app.command("sweep")
def sweep_command(
    config: Annotated[Path, typer.Argument(help="YAML file; see training/configs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the runs; give it again to go on.")],
    energy_weights: Annotated[str, typer.Option(help="Numbers with commas between them.")] = "1e-2,1e-3,1e-4,1e-5,1e-6",
    accelerator: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    devices: Annotated[int, typer.Option(help="Number of devices.")] = 1,
) -> None:
    """Train once per energy weight and compare the validation errors."""
    from training.config import read_config
    from training.guard import NonFiniteTraining
    from training.run import TrainingStopped
    from training.sweep import sweep

    try:
        weights = tuple(float(w) for w in energy_weights.split(","))
        rows = sweep(read_config(config), output, weights, accelerator=accelerator, devices=devices)
    except TrainingStopped as stopped:
        raise _stopped(stopped, "give the same command again to go on") from None
    except (*_EXPECTED, NonFiniteTraining) as error:
        raise _fail(error) from None
    _print_errors("energy weight", [(f"{row['energy_weight']:g}",) for row in rows], rows)


@app.command("ablate")
def ablate_command(
    config: Annotated[Path, typer.Argument(help="YAML file with base and variants; see training/configs/ablation.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the runs; give it again to go on.")],
    accelerator: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    devices: Annotated[int, typer.Option(help="Number of devices.")] = 1,
) -> None:
    """Train variants of one configuration for the same steps and compare the validation errors."""
    from training.ablate import ablate, read_ablation
    from training.guard import NonFiniteTraining
    from training.run import TrainingStopped

    try:
        rows = ablate(read_ablation(config), output, accelerator=accelerator, devices=devices)
    except TrainingStopped as stopped:
        raise _stopped(stopped, "give the same command again to go on") from None
    except (*_EXPECTED, NonFiniteTraining) as error:
        raise _fail(error) from None
    _print_errors("variant", [(row["variant"], f"{row['parameters']:,}", str(row["step"])) for row in rows], rows, "parameters", "steps")


@app.command("evaluate")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="Checkpoint, exported file, or name of a released model.")],
    data: Annotated[Path, typer.Argument(help="Packed data set, any file that prepare reads, or a folder in COMP6's layout.")],
    split: Annotated[str, typer.Option(help="all, train, validation or test.")] = "all",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory for metrics.json and parity.png.")] = None,
    conservative: Annotated[bool, typer.Option(help="Also differentiate the energy.")] = True,
    align_energies: Annotated[bool, typer.Option("--align-energies", help="Fit self-energies between labels and model first.")] = False,
    max_frames: Annotated[int | None, typer.Option(help="Evaluate that many frames, evenly spaced.")] = None,
    predictions: Annotated[bool, typer.Option("--predictions", help="Write labels and predictions of each frame to predictions.xyz there.")] = False,
    layout: LayoutOption = "auto",
    energy_key: EnergyKeyOption = None,
    force_key: ForceKeyOption = None,
    energy_unit: EnergyUnitOption = None,
    force_unit: ForceUnitOption = None,
    energies_only: EnergiesOnlyOption = False,
) -> None:
    """Print errors on labelled data as JSON; of a folder in COMP6's layout, also a table by subset."""
    from training.comp6 import is_folder_of_files
    from training.evaluate import evaluate

    read_as: dict[str, Any] = {
        "layout": layout,
        "energy_key": energy_key,
        "force_key": force_key,
        "energy_unit": energy_unit,
        "force_unit": force_unit,
        "energies_only": energies_only,
    }
    given = [f"--{name.replace('_', '-')}" for name, value in read_as.items() if value not in (None, False, "auto")]
    if data.is_dir() and given:
        raise _fail(ValueError(f"{data} is a directory, which says itself how it is to be read: {', '.join(given)} does not apply; leave it out"))
    if is_folder_of_files(data):
        if split != "all" or max_frames is not None or predictions:
            told = "--split, --max-frames and --predictions do not apply; for less, give the folder of one subset"
            raise _fail(ValueError(f"{data} is no packed data set: {told}"))
        _evaluate_folder(model, data, output, conservative, align_energies)
        return
    reading: dict[str, Any] = {} if data.is_dir() else read_as
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("")
            metrics = evaluate(
                model,
                data,
                split=split,
                output=output,
                conservative=conservative,
                align_energies=align_energies,
                max_frames=max_frames,
                predictions=predictions,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
                **reading,
            )
    except _EXPECTED as error:
        raise _fail(error) from None
    console.print_json(json.dumps(metrics))


def _evaluate_folder(model: str, folder: Path, output: Path | None, conservative: bool, align_energies: bool) -> None:
    from training.comp6 import comp6_table, evaluate_folder

    aside = Console(stderr=True)
    try:
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=aside) as bar:
            task = bar.add_task("evaluating")
            metrics = evaluate_folder(
                model,
                folder,
                output,
                conservative,
                align_energies,
                progress=lambda name, n: bar.update(task, description=f"{name}: {n:,} frames"),
            )
    except _EXPECTED as error:
        raise _fail(error) from None
    aside.print(comp6_table(metrics))
    for note in metrics["notes"]:
        aside.print(note, highlight=False, soft_wrap=True)
    console.print_json(json.dumps(metrics))


@app.command("export")
def export_command(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Checkpoint of fit, or exported file; several make a committee, a model that knows its uncertainty.")
    ],
    output: Annotated[Path, typer.Argument(help="File to write; its stem is the model's name.")],
    level_of_theory: Annotated[str | None, typer.Option(help="Origin of the labels; by default what the data say.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the weights; by default that of the exported file, if it is one.")] = None,
    metrics: Annotated[
        list[Path] | None, typer.Option(help="metrics.json of evaluate to carry in the file, as NAME=PATH; by default as for the licence.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    fast: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint, exported file or released model with a cheap network whose conservative forces drive the inner steps of multiple "
            "time stepping; by default that of the exported file, if it is one and has one."
        ),
    ] = None,
) -> None:
    """Write a TorchScript model file and validate it."""
    from training.export import ExportError, export

    try:
        carried = {}
        for item in metrics or []:
            name, _, path = str(item).partition("=")
            if not path:
                raise ValueError(f"--metrics must be NAME=PATH, got {item}")
            try:
                carried[name] = json.loads(Path(path).read_text())
            except ValueError as error:  # of JSON, or of UTF-8
                raise ValueError(f"--metrics {item}: {path} is not the metrics.json of evaluate ({error})") from None
        checks = export(checkpoints, output, level_of_theory, licence, metrics=carried or None, overwrite=overwrite, fast=fast)
    except (*_EXPECTED, ExportError) as error:
        raise _fail(error) from None
    console.print(f"wrote {output}: {len(checks)} checks passed", highlight=False)


@app.command("label")
def label_command(
    inputs: Annotated[list[str], typer.Argument(help="SMILES, .smi files, or structure files that ASE reads (all frames).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HDF5 file to make, in the ANI-1x layout.")],
    calculator: Annotated[str, typer.Option(help="What labels: the name of an ASE calculator, or module:factory.")],
    option: Annotated[list[str] | None, typer.Option(help="key=value for the calculator; JSON or text. Repeat for more.")] = None,
    sampler: Annotated[str | None, typer.Option(help="What drives the dynamics, given likewise; by default what labels.")] = None,
    sampler_option: Annotated[list[str] | None, typer.Option(help="key=value for the sampler.")] = None,
    conformers: Annotated[int, typer.Option(help="Conformers of each SMILES (ETKDG, relaxed by MMFF94).")] = 2,
    temperature: Annotated[list[float] | None, typer.Option(help="K, of dynamics, displacements and scans; repeat. By default 300 and 600.")] = None,
    frames: Annotated[int, typer.Option(help="Frames of Langevin dynamics for each conformer and temperature.")] = 4,
    displacements: Annotated[int, typer.Option(help="Displacements along model normal modes for each conformer and temperature.")] = 4,
    stretches: Annotated[int, typer.Option(help="Displacements with one or two bonds stretched or pressed, likewise.")] = 0,
    torsions: Annotated[int, typer.Option(help="Displacements with a torsion at a random angle, likewise.")] = 0,
    bends: Annotated[int, typer.Option(help="Displacements with an angle bent by up to 40 degrees, likewise.")] = 0,
    dimers: Annotated[int, typer.Option(help="Random pairs of the molecules, in all.")] = 0,
    contacts: Annotated[tuple[float, float], typer.Option(help="Least and largest closest contact of the pairs, Angstrom.")] = (1.6, 4.0),
    hold_out: Annotated[
        list[str] | None, typer.Option(help="Data file or packed data set: leave out formulas of the file, or those the set's split holds out.")
    ] = None,
    committee: Annotated[list[str] | None, typer.Option(help="Exported model; give two or more: their disagreement picks.")] = None,
    select: Annotated[int | None, typer.Option(help="How many candidates to label: those on which the committee disagrees most.")] = None,
    max_force: Annotated[float, typer.Option(help="Leave out labels with a larger force on an atom, kcal/mol/Angstrom.")] = 400.0,
    level_of_theory: Annotated[str | None, typer.Option(help="What the labels are; by default the calculator and its options.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that left OUTPUT.journal.")] = False,
) -> None:
    """Make training data: sample structures, label them with any ASE calculator."""
    from training.label.calculators import parse_options
    from training.label.run import LabelSettings, label

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        settings = LabelSettings(
            calculator=calculator,
            options=parse_options(option or []),
            sampler=sampler,
            sampler_options=parse_options(sampler_option or []),
            conformers=conformers,
            temperatures=tuple(temperature or (300.0, 600.0)),
            frames=frames,
            displacements=displacements,
            stretches=stretches,
            torsions=torsions,
            bends=bends,
            dimers=dimers,
            contacts=contacts,
            hold_out=tuple(hold_out or ()),
            committee=tuple(committee or ()),
            select=select,
            max_force=max_force,
            seed=seed,
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            tasks: dict[str, Any] = {}

            def tell(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bar.add_task(stage)
                bar.update(tasks[stage], completed=done, total=total)

            report = label(inputs, output, settings, level_of_theory, resume, tell)
    except _EXPECTED as error:
        raise _fail(error) from None
    console.print(f"wrote {output}: {report['labelled']:,} frames labelled of {report['candidates']:,} candidates", highlight=False)
    for reason, n in report["failures"].items():
        console.print(f"left out {n:,} frames: {reason}", highlight=False, soft_wrap=True)
    for note in report["notes"]:
        console.print(note, highlight=False, soft_wrap=True)


@app.command("figures")
def figures_command(
    runs: Annotated[list[Path], typer.Argument(help="Directories of fit.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for tables and pictures.")] = Path("figures"),
) -> None:
    """Make counterparts of the thesis' Tables 3.1 and 3.2 and of its learning curves."""
    from training.figures import figures

    try:
        made = figures(runs, output)
    except _EXPECTED as error:
        raise _fail(error) from None
    for path in made:
        console.print(str(path), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
