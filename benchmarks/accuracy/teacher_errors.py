"""A model and the ANI-1x ensemble, whose labels it was trained on, on the same frames with true DFT labels.

    python -m benchmarks.accuracy.teacher_errors se3-ani1x train_300K.xyz test_600K.xyz --output benchmarks/accuracy/teacher_errors.json

Needs torchani 2.2.4 (see `benchmarks/accuracy/teachers.py`). Of both, energies are compared after the references per element are fitted, file
by file. The last column says by how much the model's error exceeds the ensemble's own, which a model of its labels cannot be expected to undercut.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.accuracy.teachers import ANI1xEnsemble
from training.data.frames import ReadReport
from training.data.prepare import open_blocks
from training.evaluate import evaluate
from training.units import KCAL_PER_MOL_PER_EV


def ensemble_errors(path: Path, max_frames: int | None) -> dict[str, float]:
    """RMSE of the ensemble's energies and forces, kcal/mol and kcal/mol/Angstrom, on the frames that `evaluate` takes."""
    frames = [(block, i) for block in open_blocks(path, ReadReport()) for i in range(len(block.energies))]
    if max_frames is not None and len(frames) > max_frames:
        frames = [frames[i] for i in np.linspace(0, len(frames) - 1, max_frames).astype(int)]
    trusting = ANI1xEnsemble(max_force_std=np.inf, max_energy_std=np.inf)
    forces, energies, compositions = [], np.zeros(len(frames)), np.zeros((len(frames), 119))
    for k, (block, i) in enumerate(track(frames, "ensemble", console=Console(stderr=True))):
        assert block.forces is not None
        atoms = Atoms(block.atomic_numbers, block.coordinates[i].astype(float), calculator=trusting)
        energies[k] = atoms.get_potential_energy() - block.energies[i]
        forces.append((atoms.get_forces() - block.forces[i]).ravel())
        compositions[k] = np.bincount(block.atomic_numbers, minlength=119)
    energies -= compositions @ np.linalg.lstsq(compositions, energies, rcond=None)[0]
    energy, force = (float(np.sqrt(np.mean(np.square(e)))) * KCAL_PER_MOL_PER_EV for e in (energies, np.concatenate(forces)))
    return {"energy_rmse_kcal_per_mol": energy, "force_rmse_kcal_per_mol_per_angstrom": force, "n_frames": len(frames)}


def compare(model: str, path: Path, max_frames: int | None) -> dict[str, Any]:
    """Errors of both on one file, and the ratio of the force errors."""
    ours = evaluate(model, path, align_energies=True, max_frames=max_frames)
    ensemble = ensemble_errors(path, max_frames)
    if ours["n_frames"] != ensemble["n_frames"]:
        raise RuntimeError(f"{path}: the model was given {ours['n_frames']} frames and the ensemble {ensemble['n_frames']}")
    kinds = {"conservative": "conservative_force", "direct": "force"}
    force = {kind: ours[f"{key}_rmse_kcal_per_mol_per_angstrom"] for kind, key in kinds.items()}
    return {
        "data": path.name,
        "n_frames": ensemble["n_frames"],
        "ensemble": {k: v for k, v in ensemble.items() if k != "n_frames"},
        "model": {
            "energy_rmse_kcal_per_mol": ours["energy_rmse_kcal_per_mol"],
            **{f"{kind}_force_rmse_kcal_per_mol_per_angstrom": error for kind, error in force.items()},
        },
        "force_error_over_ensemble": {kind: error / ensemble["force_rmse_kcal_per_mol_per_angstrom"] for kind, error in force.items()},
    }


def main(argv: list[str] | None = None) -> None:
    """Print and store the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="checkpoint, exported file or name of a released model")
    parser.add_argument("data", type=Path, nargs="+", help="files with energies and forces by wB97X/6-31G(d)")
    parser.add_argument("--max-frames", type=int, help="of each file, evenly spaced")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args(argv)
    rows = [compare(arguments.model, path, arguments.max_frames) for path in arguments.data]
    table = Table("data", "who", "energy (kcal/mol)", "force (kcal/mol/Å)", "above the ensemble", title="RMSE against DFT")
    for row in rows:
        name = f"{row['data']}, {row['n_frames']} frames"
        energy, force = row["ensemble"]["energy_rmse_kcal_per_mol"], row["ensemble"]["force_rmse_kcal_per_mol_per_angstrom"]
        table.add_row(name, "ANI-1x ensemble", f"{energy:.2f}", f"{force:.2f}", "")
        for kind, ratio in row["force_error_over_ensemble"].items():
            energy, force = row["model"]["energy_rmse_kcal_per_mol"], row["model"][f"{kind}_force_rmse_kcal_per_mol_per_angstrom"]
            table.add_row("", f"{arguments.model}, {kind}", f"{energy:.2f}", f"{force:.2f}", f"{ratio - 1:+.0%}")
    Console().print(table)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"model": arguments.model, "files": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
