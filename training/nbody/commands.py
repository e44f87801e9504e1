"""``python -m training nbody simulate | fit | evaluate``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.nbody.protocol import PROTOCOLS

app = typer.Typer(no_args_is_help=True, help="The N-body experiment: five charged particles.")
console = Console()


def _fail(error: Exception) -> typer.Exit:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return typer.Exit(1)


@app.command("simulate")
def simulate_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")],
    protocol: Annotated[str, typer.Option(help=f"{' or '.join(PROTOCOLS)}: splits, and what will be asked.")] = "thesis",
    trajectories: Annotated[int | None, typer.Option(min=1, help="By default those of the protocol.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the starts.")] = 0,
) -> None:
    """Make the trajectories."""
    from training.nbody.simulate import write_trajectories

    try:
        if protocol not in PROTOCOLS:
            raise ValueError(f"--protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
        n = PROTOCOLS[protocol].n_trajectories if trajectories is None else trajectories
        columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=n)
            write_trajectories(output, protocol, n, seed, lambda done, _: bar.update(task, completed=done))
    except (ValueError, OSError) as error:
        raise _fail(error) from None
    console.print(f"wrote {n:,} trajectories to {output}", highlight=False)


@app.command("fit")
def fit_command(
    config: Annotated[Path | None, typer.Argument(help="YAML file; see training/configs/nbody.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the run.")] = Path("run"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output from its last checkpoint.")] = False,
    accelerator: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
) -> None:
    """Train a network, or continue an interrupted training."""
    from training.guard import NonFiniteTraining
    from training.nbody.fit import fit_nbody, read_nbody_config
    from training.run import TrainingStopped

    try:
        module = fit_nbody(None if config is None else read_nbody_config(config), output, resume, accelerator)
    except TrainingStopped as stopped:
        Console(stderr=True).print(f"{stopped}; continue with --resume", highlight=False, soft_wrap=True)
        raise typer.Exit(stopped.exit_code) from None
    except (ValueError, OSError, NonFiniteTraining) as error:
        raise _fail(error) from None
    if module.bad_batches:
        console.print(f"{len(module.bad_batches)} trajectories were in batches that were not finite and skipped; see the checkpoint", highlight=False)
    console.print(f"wrote {output / 'best.ckpt'}, last.ckpt and log.csv", highlight=False)


@app.command("evaluate")
def evaluate_command(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of fit.")],
    data: Annotated[Path, typer.Argument(help="Trajectories of simulate.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory for metrics.json and trajectories.png.")] = None,
) -> None:
    """Print the error on the test trajectories as JSON."""
    from training.nbody.evaluate import evaluate_nbody

    try:
        metrics: dict[str, Any] = evaluate_nbody(checkpoint, data, output)
    except (ValueError, OSError) as error:
        raise _fail(error) from None
    console.print_json(json.dumps(metrics))
