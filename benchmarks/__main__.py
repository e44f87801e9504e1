"""``python -m benchmarks NAME``: one module for each table; ``python -m benchmarks NAME --help`` tells its options."""

import ast
import importlib
import sys
from pathlib import Path

import typer

#: Name of each benchmark and its module.
BENCHMARKS = {
    "speed": "benchmarks.speed",
    "scaling": "benchmarks.scaling",
    "threads": "benchmarks.threads",
    "memory": "benchmarks.memory",
    "neighbors": "benchmarks.neighbors",
    "operators": "benchmarks.operators",
    "endurance": "benchmarks.endurance",
    "gpu": "benchmarks.gpu",
    "kernels": "benchmarks.kernels",
    "stability": "benchmarks.stability",
    "heating": "benchmarks.heating",
    "equivariance": "benchmarks.equivariance",
    "training-throughput": "benchmarks.training_throughput",
    "allocator": "benchmarks.allocator",
    "force-matching": "benchmarks.force_matching",
    "diverging-training": "benchmarks.diverging_training",
    "data-scale": "benchmarks.data_scale",
    "dft-reference": "benchmarks.dft_reference.compute",
}

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Reproduce the tables of this project.", pretty_exceptions_enable=False)


def path_of(name: str) -> Path:
    """The file of a benchmark."""
    return Path(__file__).parent.parent / (BENCHMARKS[name].replace(".", "/") + ".py")


def _register(name: str) -> None:
    def run(context: typer.Context) -> None:
        sys.argv = [f"python -m benchmarks {name}", *context.args]
        importlib.import_module(BENCHMARKS[name]).main()

    # Read, not imported: some need packages that others do not.
    summary = (ast.get_docstring(ast.parse(path_of(name).read_text())) or "").split("\n")[0]
    # Each module has an argument parser of its own, which shows its help too.
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(name, help=summary, add_help_option=False, context_settings=settings)(run)


for _name in BENCHMARKS:
    _register(_name)

if __name__ == "__main__":
    app()
