"""``openmm-se3``: simulate a structure file, list and inspect models, check a model file and its physics."""

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import openmm_se3
from openmm_se3.errors import ModelFileError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="SE(3)-Transformer potentials for OpenMM.", pretty_exceptions_enable=False)
console = Console()


def _fail(error: Exception) -> typer.Exit:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return typer.Exit(1)


@contextmanager
def _notices() -> Iterator[None]:
    """Print warnings meant for users as one line, without the place in the code that raised them."""
    plain = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
    ) -> None:
        if category is UserWarning:
            console.print(f"[bold yellow]notice:[/] {escape(str(message))}", highlight=False, soft_wrap=True)
        else:
            plain(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def _version(value: bool) -> None:
    if value:
        console.print(f"openmm-se3 {openmm_se3.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    """SE(3)-Transformer potentials for OpenMM."""


def _edges(text: str) -> tuple[float, ...]:
    """Three edges from ``2.5`` or ``2.5,2.5,3``; none from ``none``."""
    if text.strip().lower() == "none":
        return ()
    try:
        edges = tuple(float(x) for x in text.split(","))
    except ValueError:
        raise ValueError(f"--box must be one number or three with commas, in nm, or none, got {text!r}") from None
    return edges * 3 if len(edges) == 1 else edges


@app.command()
def simulate(
    context: typer.Context,
    structure: Annotated[Path | None, typer.Argument(help="Structure file: .pdb, .cif (mmCIF), .sdf, .mol or .xyz, with hydrogens.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory to write; by default the structure's name + '-md'.")] = None,
    model: Annotated[str, typer.Option(help="Released model or exported file.")] = "se3-ani1x",
    forces: Annotated[
        str,
        typer.Option(
            help="direct, conservative, mts: direct forces in the inner steps, corrected to conservative, mts-fast: a fast network in them, or auto: "
            "direct for one molecule with a thermostat, else conservative."
        ),
    ] = "auto",
    precision: Annotated[str, typer.Option(help="single or double.")] = "single",
    ensemble: Annotated[str, typer.Option(help="nvt (Langevin) or nve (Verlet).")] = "nvt",
    pressure: Annotated[float | None, typer.Option(help="Bar; keeps it by a Monte Carlo barostat, in a periodic box.")] = None,
    box: Annotated[
        str | None, typer.Option(help="Edges of a periodic box in nm: one number, or three with commas; none for vacuum; by default the structure's.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Kelvin; 0 starts at rest.")] = 300.0,
    timestep: Annotated[float, typer.Option(help="Femtoseconds; with mts and mts-fast of the inner steps.")] = 0.5,
    inner_steps: Annotated[int, typer.Option(help="With mts and mts-fast, inner steps to each step: 1 or even.")] = 4,
    hydrogen_mass: Annotated[
        float | None, typer.Option(help="Dalton, taken from the atoms that hydrogens are bonded to; slows their vibrations for longer steps.")
    ] = None,
    friction: Annotated[float, typer.Option(help="Langevin friction, 1/ps.")] = 10.0,
    steps: Annotated[int, typer.Option(help="Steps in all.")] = 20_000,
    report_every: Annotated[int, typer.Option(help="Steps between frames, log lines and checkpoints.")] = 100,
    minimize: Annotated[bool, typer.Option(help="Minimise first.")] = True,
    platform: Annotated[str, typer.Option(help="OpenMM platform, or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of velocities and thermostat, 1 or more.")] = 1,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the run in --output from its checkpoint, with --steps up to more steps, with --model by a file that was moved."
        ),
    ] = False,
) -> None:
    """Minimise a structure, run dynamics, write trajectory, log, checkpoint and a picture."""
    import openmm

    from openmm_se3.errors import SimulationError
    from openmm_se3.simulate import simulate as run
    from openmm_se3.simulation_files import PLOT_FILE, TRAJECTORY_FILE, read_settings, temperature_deviation
    from openmm_se3.simulation_settings import SimulationSettings

    if structure is None and not (resume and output is not None):
        raise _fail(ValueError("give a structure file, or --resume with --output"))
    directory = output if output is not None else Path(f"{structure.stem}-md")  # type: ignore[union-attr]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    seen: list[tuple[float, float]] = []
    try:
        settings = None
        changes: dict[str, Any] = {}
        if resume:
            sources = {name: context.get_parameter_source(name) for name in context.params}
            given = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
            refused = sorted(given - {"structure", "output", "steps", "model", "resume"})
            if refused:
                options = ", ".join("--" + name.replace("_", "-") for name in refused)
                raise ValueError(
                    f"a run goes on as it began: --resume takes --steps, to make it longer, and --model, whose file was moved, but not {options}"
                )
            if structure is not None and Path(read_settings(directory).structure) != structure.resolve():
                raise ValueError(
                    f"the run in {directory} is of {read_settings(directory).structure}, not of {structure}; --resume needs --output alone"
                )
            changes = {name: value for name, value in (("steps", steps), ("model", model)) if name in given}
        else:
            settings = SimulationSettings(
                structure=str(structure),
                model=model,
                forces=forces,
                precision=precision,
                ensemble=ensemble,
                pressure_bar=pressure,
                box_nm=None if box is None else _edges(box),
                temperature=temperature,
                timestep_fs=timestep,
                inner_steps=inner_steps,
                hydrogen_mass=hydrogen_mass,
                friction_per_ps=friction,
                steps=steps,
                report_every=report_every,
                minimize=minimize,
                platform=platform,
                seed=seed,
            )
        with _notices(), Progress(*columns, console=console) as bar:
            task = bar.add_task("setting up", total=None)

            def show(step: int, total: int, picoseconds: float, kelvin: float, potential: float) -> None:
                seen.append((time.monotonic(), picoseconds))
                (t0, p0), (t1, p1) = seen[0], seen[-1]
                speed = f"  {(p1 - p0) * 1e-3 / (t1 - t0) * 86400:.2f} ns/day" if t1 > t0 else ""
                bar.update(task, completed=step, total=total, description=f"{kelvin:.0f} K  {potential:.1f} kJ/mol{speed}")

            run(settings, directory, resume, show, **changes)
    except (SimulationError, ValueError, OSError, ImportError, openmm.OpenMMException) as error:
        raise _fail(error) from None
    deviation = temperature_deviation(directory)
    if deviation is not None:
        heated = deviation > 0 and read_settings(directory).forces == "direct"
        remedy = "Direct forces put heat in: use --forces mts or conservative" if heated else "Take shorter steps"
        console.print(
            f"[bold yellow]notice:[/] the mean temperature is {100 * deviation:+.0f}% off the thermostat's. {remedy}, or raise --friction.",
            highlight=False,
            soft_wrap=True,
        )
    written = f"wrote {directory / TRAJECTORY_FILE}, log.csv, final.pdb and {directory / PLOT_FILE}"
    console.print(written, markup=False, highlight=False, soft_wrap=True)


@app.command()
def models() -> None:
    """List the released models."""
    from openmm_se3.model_file import available_models, read_metadata

    table = Table("name", "elements", "cutoff (nm)", "parameters", "force RMSE (kcal/mol/Å)", "licence")
    for name in available_models():
        m = read_metadata(name)
        errors = []
        for kind, key in (("direct", "force_rmse"), ("conservative", "conservative_force_rmse")):
            error = m.metrics.get("test", {}).get(f"{key}_kcal_per_mol_per_angstrom")
            if error is not None and kind not in m.untrained:
                errors.append(f"{kind} {error:.2f}")
        table.add_row(name, " ".join(m.elements), f"{m.cutoff_nm:g}", f"{m.n_parameters:,}", ", ".join(errors) or "-", escape(m.licence))
    console.print(table)


@app.command()
def info(model: Annotated[str, typer.Argument(help="Released model or exported file.")]) -> None:
    """Print what a model says of itself, as JSON."""
    from dataclasses import asdict

    from openmm_se3.model_file import read_metadata

    try:
        metadata = asdict(read_metadata(model))
    except ModelFileError as error:
        raise _fail(error) from None
    metadata["golden"] = [g["name"] for g in metadata["golden"]]
    console.print_json(json.dumps(metadata))


@app.command()
def validate(
    model: Annotated[str, typer.Argument(help="Released model or exported file.")],
    physics: Annotated[bool, typer.Option("--physics", help="Measure the physics instead; writes a report and pictures.")] = False,
    full: Annotated[bool, typer.Option("--full", help="With --physics: long runs and a water box, hours; else under two minutes.")] = False,
    measure: Annotated[list[str] | None, typer.Option(help="With --physics: only this measure; may be given several times.")] = None,
    molecule: Annotated[
        list[str] | None,
        typer.Option(help="With --physics: only this one of the molecules whose forces and dynamics are measured; may be given several times."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="With --physics: directory; by default the model's name + '-physics'.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="With --physics: keep what --output holds, do the rest.")] = False,
) -> None:
    """Check that a model file keeps the contract, alone and inside OpenMM; or measure its physics.

    Fails if a check fails, or if a quantity misses what it must keep.
    """
    if physics:
        _validate_physics(model, output if output is not None else Path(f"{Path(model).stem}-physics"), full, measure, molecule, resume)
        return
    if full or measure or molecule or output is not None or resume:
        raise _fail(ValueError("--full, --measure, --molecule, --output and --resume go with --physics"))
    from openmm_se3.validation import validate_model

    try:
        checks = validate_model(model)
    except (ModelFileError, ImportError) as error:
        raise _fail(error) from None
    table = Table("check", "value", "limit", "")
    for check in checks:
        table.add_row(escape(check.name), f"{check.value:.2e}", f"{check.limit:.0e}", "ok" if check.passed else "[bold red]FAILED[/]")
    console.print(table)
    failed = sum(not c.passed for c in checks)
    console.print(f"{len(checks) - failed} of {len(checks)} checks passed", highlight=False)
    if failed:
        raise typer.Exit(1)


def _validate_physics(model: str, output: Path, full: bool, measures: list[str] | None, molecules: list[str] | None, resume: bool) -> None:
    from dataclasses import replace

    from openmm_se3.errors import SimulationError
    from openmm_se3.physics.report import missed, report_table
    from openmm_se3.physics.settings import FULL, QUICK
    from openmm_se3.physics.validate import MEASURES, REPORT_FILE, validate_physics

    settings = FULL if full else QUICK
    if molecules:
        settings = replace(settings, molecules=tuple(dict.fromkeys(molecules)))
    try:
        with Progress(TextColumn("{task.description:14}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
            tasks: dict[str, TaskID] = {}

            def show(name: str, share: float) -> None:
                if name not in tasks:
                    tasks[name] = bar.add_task(name, total=1.0)
                bar.update(tasks[name], completed=share)

            sections = validate_physics(model, output, settings, measures or tuple(MEASURES), resume, show)
    except (SimulationError, ValueError, OSError, ImportError) as error:
        raise _fail(error) from None
    console.print(report_table(sections))
    written = f"wrote {output / REPORT_FILE} and a picture for each measure with curves"
    console.print(written, markup=False, highlight=False, soft_wrap=True)
    if short := missed(sections):
        console.print(f"{len(short)} quantities miss what they must keep", highlight=False)
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Check the installation: versions, forces on every platform, and what to do about what does not fit."""
    from openmm_se3.doctor import diagnose

    with console.status("evaluating forces on every platform"):
        diagnosis = diagnose()
    versions = Table("part", "version")
    for part, value in diagnosis.versions.items():
        versions.add_row(escape(part), escape(value))
    console.print(versions)
    table = Table("platform", "through", "largest force error (kJ/mol/nm)", "ms", "")
    for e in diagnosis.evaluations:
        numbers = ("-", "-") if e.force_error is None or e.milliseconds is None else (f"{e.force_error:.1e}", f"{e.milliseconds:.1f}")
        table.add_row(e.platform, e.backend, *numbers, "ok" if e.works else f"[bold red]FAILED[/] {escape(str(e.error))}")
    console.print(table)
    for problem in diagnosis.problems:
        text, mend = escape(problem.text), escape(problem.mend)
        console.print(f"[bold yellow]problem:[/] {text}\n   [bold]mend:[/] {mend}", highlight=False, soft_wrap=True)
    if not diagnosis.works:
        raise _fail(RuntimeError("the model works on no platform"))
    console.print("no problems found" if not diagnosis.problems else "the model works, with the problems above", highlight=False)


if __name__ == "__main__":
    app()
