"""Training at ten times the learning rate: every preset ends with a clear report, not in a crash and not in silent zeros.

    python -m benchmarks diverging-training --runs runs/diverging --output benchmarks/diverging_training.json

Each configuration trains on the small molecules of `tests/data/ani1x_sample.h5`, four in a batch, from random weights, its rate constant at ten
times the largest that it asks for. The record says for each: how the run ended, its steps, the batches that were skipped and why, loss at start and
end, whether weights and running means are finite, and how large the predictions are and how many of them are exactly zero. Call it again to go on
after an interruption.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL

from training.callbacks import read_log
from training.checkpoint import load_checkpoint
from training.config import read_config
from training.data.batches import Collator
from training.data.packed import PackedDataset
from training.data.prepare import prepare
from training.fit import fit
from training.guard import NonFiniteTraining
from training.loss import predict
from training.run import LAST
from training.units import KCAL_PER_MOL_PER_EV

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "tests" / "data" / "ani1x_sample.h5"
CONFIGURATIONS = ("thesis-basic", "thesis-wider", "thesis-higher-order", "thesis-energy-only", "se3-ani1x-1-direct", "se3-ani1x-3-joint")
TOO_HIGH = 10.0


def configuration(name, data, steps, seed, compiled):
    """That of a preset, with too high a rate, small batches, and nothing that a short run would miss."""
    config = read_config(ROOT / "training" / "configs" / f"{name}.yaml")
    rate = TOO_HIGH * config.optimizer.learning_rate
    optimizer = config.optimizer.model_copy(update={"learning_rate": rate, "schedule": "steps", "milestones": ()})
    run = config.run.model_copy(
        update={
            "max_steps": steps,
            "batch_molecules": 4,
            "validate_every": min(1000, steps),
            "checkpoint_every": 500,
            "log_every": 20,
            "seed": seed,
            "compile": compiled,
        }
    )
    return config.model_copy(update={"data": str(data), "initial_model": None, "optimizer": optimizer, "run": run})


def all_finite(tensors):
    """Whether no number is NaN or infinite."""
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())


def root_mean_square(values):
    """Of a tensor, as a float."""
    return float(values.double().square().mean().sqrt())


def predictions(checkpoint, dataset):
    """Size of the averaged network's predictions on all frames beside that of the labels, kcal/mol and kcal/mol/Angstrom."""
    loaded = load_checkpoint(checkpoint)
    numbers = tuple(NUMBER_OF_SYMBOL[s] for s in loaded.config.network.elements)
    batch = Collator(dataset, numbers, loaded.config.network.cutoff)(dataset.indices("all"))
    with torch.no_grad():
        energies, forces, _ = predict(loaded.network, batch, False, create_graph=False)
    formulas = np.split(np.arange(len(energies)), np.flatnonzero(np.diff(dataset.formula_index)) + 1)
    spread = {k: torch.cat([e[i] - e[i].mean() for i in formulas]) for k, e in (("predicted", energies), ("labels", batch.energies))}
    result = {
        "energy_rms": root_mean_square(energies) * KCAL_PER_MOL_PER_EV,
        "energy_rms_of_labels": root_mean_square(batch.energies) * KCAL_PER_MOL_PER_EV,
        "energy_spread_within_formulas": root_mean_square(spread["predicted"]) * KCAL_PER_MOL_PER_EV,
        "energy_spread_within_formulas_of_labels": root_mean_square(spread["labels"]) * KCAL_PER_MOL_PER_EV,
        "energies_exactly_zero": int((energies == 0).sum()),
        "finite": all_finite([energies, forces]),
    }
    if batch.forces is not None:
        result |= {
            "force_rms": root_mean_square(forces) * KCAL_PER_MOL_PER_EV,
            "force_rms_of_labels": root_mean_square(batch.forces) * KCAL_PER_MOL_PER_EV,
            "forces_exactly_zero": int((forces == 0).all(-1).sum()),
            "atoms": len(forces),
        }
    return result


def diverge(config, dataset, run):
    """Train one configuration, or go on with it, and tell what happened."""
    ended = "all steps done"
    try:
        fit(config, run, resume=(run / LAST).exists(), accelerator="cpu")
    except NonFiniteTraining as error:
        ended = f"NonFiniteTraining: {error}"
    record = {
        "configuration": run.name,
        "learning_rate": config.optimizer.learning_rate,
        "loss_weights": config.loss.model_dump(),
        "steps_asked_for": config.run.max_steps,
        "ended": ended,
    }
    if not (run / LAST).exists():
        return record | {"checkpoint": "none: the run ended before the first"}
    raw = torch.load(run / LAST, map_location="cpu", weights_only=True)
    skipped = raw["openmm_se3"]["bad_batches"]
    losses = [float(row["loss"]) for row in read_log(run / "log.csv") if row["loss"]]
    return record | {
        "steps": int(raw["global_step"]),
        "skipped_batches": len({b["batch"] for b in skipped}),
        "skipped_molecules": len(skipped),
        "reasons": sorted({b["reason"] for b in skipped}),
        "loss_of_first_20_logged": float(np.mean(losses[:20])),
        "loss_of_last_20_logged": float(np.mean(losses[-20:])),
        "largest_loss_logged": max(losses),
        "weights_and_means_finite": all_finite(raw["state_dict"].values()),
        "predictions": predictions(run / LAST, dataset),
    }


def main():
    """Run what the record lacks; print and write it after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--configurations", nargs="+", default=list(CONFIGURATIONS))
    parser.add_argument("--compile", action="store_true", help="quicker, needs a C++ compiler")
    parser.add_argument("--runs", type=Path, default=Path("runs/diverging"), help="directory of the runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; what it holds already is not run again")
    arguments = parser.parse_args()
    records = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    for name in arguments.configurations:
        if any(r["configuration"] == name for r in records):
            continue
        energies_only = "energy-only" in name
        packed = arguments.runs / ("packed-energies" if energies_only else "packed")
        if not packed.exists():
            keys = {"energies_only": True} if energies_only else {"force_key": "ani1x_ensemble.forces"}
            prepare([SAMPLE], packed, energy_key="ani1x_ensemble.energy", validation=0.2, **keys)
        config = configuration(name, packed, arguments.steps, arguments.seed, arguments.compile)
        records.append(diverge(config, PackedDataset(packed), arguments.runs / name))
        print(json.dumps(records[-1], indent=1), flush=True)
        arguments.output.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
