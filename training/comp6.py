"""`evaluate` on a folder in the layout of COMP6: errors of energies, conformer energy differences and forces, subset by subset.

COMP6 (Smith et al., J. Chem. Phys. 148, 241733 (2018)) has a folder per subset (ANI-MD, DrugBank, GDB07to09, GDB10to13, Tripeptides, s66x8)
with HDF5 files in it, and in those a group per molecule: ``species`` (symbols), ``coordinates`` (Angstrom), ``energies`` (Hartree, total)
and ``forces`` (Hartree/Angstrom). What it calls forces are gradients of the energy in the files that its authors and users looked at, of the opposite
sign, and nothing in a file tells. So the sign is measured, file by file, against the forces of the model, and the report says what was found.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from rich.table import Table

from training.data.batches import Batch, assemble
from training.data.frames import DataError, FrameBlock, ReadReport
from training.data.hdf5 import read_ani1
from training.evaluate import Evaluator, open_model, refuse_to_overwrite, with_units
from training.loss import ErrorSums

#: Below this correlation with the model's forces a label is no better than noise and its sign stays open.
CERTAIN_CORRELATION = 0.5
#: Labels in Hartree/Bohr read as Hartree/Angstrom come out 0.53 times as large as the model's forces; a poor model is not that far off.
PLAUSIBLE_SLOPE = (0.7, 1.4)

_BATCH_EDGES = 25_000


def is_folder_of_files(path: Path) -> bool:
    """Whether `path` is a directory, but not a packed data set."""
    return path.is_dir() and not (path / "metadata.json").exists()


def find_subsets(folder: Path) -> dict[str, list[Path]]:
    """HDF5 files below a folder by subset: the name of the directory that holds them, or of the file if that is `folder` itself.

    Raises
    ------
    DataError
        If there are none.
    """
    subsets: dict[str, list[Path]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".h5", ".hdf5") and p.is_file()):
        subsets.setdefault(path.stem if path.parent == folder else path.parent.name, []).append(path)
    if not subsets:
        raise DataError(
            f"{folder} is neither a packed data set (no metadata.json) nor a folder with HDF5 files in it; "
            "give one that 'python -m training prepare' made, or the folder of COMP6"
        )
    return subsets


def pair_difference_sums(errors: np.ndarray) -> tuple[int, float, float]:
    """Errors of the energy differences of all pairs of conformers, from the errors of their energies.

    With e_i sorted, sum_{i<j} |e_j - e_i| = sum_i (2i - n + 1) e_i, and sum_{i<j} (e_j - e_i)^2 = n sum_i (e_i - mean)^2: no pair is enumerated.

    Parameters
    ----------
    errors : ndarray
        ``(n_conformers,)`` error of the energy of each.

    Returns
    -------
    tuple
        Number of pairs, sum of the absolute errors, sum of their squares.
    """
    n = len(errors)
    centred = np.sort(errors - errors.mean())
    return n * (n - 1) // 2, float(((2 * np.arange(n) - n + 1) * centred).sum()), float(n * np.square(centred).sum())


@dataclass
class _ForceLabels:
    """What the forces of one file look like beside those of the model, and the errors under either sign."""

    cross: float = 0.0
    label_square: float = 0.0
    model_square: float = 0.0
    as_stored: ErrorSums = field(default_factory=ErrorSums)
    negated: ErrorSums = field(default_factory=ErrorSums)

    def add(self, labels: torch.Tensor, direct: torch.Tensor, conservative: torch.Tensor | None) -> None:
        """Add the forces of one batch, ``(n_atoms, 3)`` each."""
        # An energy is always trained; the direct forces of a model of energies alone are noise.
        model = (direct if conservative is None else conservative).to(torch.float64)
        stored = labels.to(torch.float64)
        self.cross += float((stored * model).sum())
        self.label_square += float(stored.square().sum())
        self.model_square += float(model.square().sum())
        for sums, sign in ((self.as_stored, 1.0), (self.negated, -1.0)):
            sums.add("force", direct - sign * labels)
            if conservative is not None:
                sums.add("conservative_force", conservative - sign * labels)

    def verdict(self) -> dict[str, Any]:
        """Kind of the labels (``forces``, ``gradients``, ``undetermined``, ``none``), correlation and slope."""
        if self.label_square == 0:
            return {"force_labels": "none"}
        correlation = self.cross / max(math.sqrt(self.label_square * self.model_square), 1e-300)
        kind = "undetermined" if not abs(correlation) >= CERTAIN_CORRELATION else "forces" if correlation > 0 else "gradients"
        slope = self.cross / max(self.model_square, 1e-300)
        return {"force_labels": kind, "force_label_correlation": correlation, "force_label_slope": slope}


@dataclass
class _Subset:
    """Everything that is summed over one subset."""

    n_molecules: int = 0
    errors: ErrorSums = field(default_factory=ErrorSums)
    energy_errors: list[np.ndarray] = field(default_factory=list)
    compositions: list[np.ndarray] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


def _molecules(path: Path, report: ReadReport) -> Iterator[list[FrameBlock]]:
    """The blocks of one molecule at a time."""
    for _, blocks in groupby(read_ani1(path, report, force_key="forces"), key=lambda block: block.group):
        yield list(blocks)


def _batches(block: FrameBlock, evaluator: Evaluator) -> Iterator[Batch]:
    """Frames of one molecule in batches of bounded size; total energies."""
    unknown = sorted({int(z) for z in block.atomic_numbers} - set(evaluator.atomic_numbers))
    if unknown:
        strange, known = (", ".join(chemical_symbols[z] for z in numbers) for numbers in (unknown, evaluator.atomic_numbers))
        raise DataError(f"{block.group} holds {strange}, which {evaluator.name} does not know; it knows {known}")
    index = {z: i for i, z in enumerate(evaluator.atomic_numbers)}
    species = np.array([index[int(z)] for z in block.atomic_numbers], dtype=np.int64)
    n_frames, n_atoms = block.coordinates.shape[:2]
    at_once = max(1, _BATCH_EDGES // (n_atoms * max(min(n_atoms - 1, 50), 1)))
    for start in range(0, n_frames, at_once):
        part = slice(start, start + at_once)
        energies = block.energies[part]
        n = len(energies)
        forces = None if block.forces is None else block.forces[part].reshape(-1, 3)
        positions = block.coordinates[part].reshape(-1, 3)
        yield assemble(np.tile(species, n), positions, n_atoms * np.arange(n + 1), energies, forces, np.arange(start, start + n), evaluator.cutoff)


def _evaluate_file(
    path: Path, evaluator: Evaluator, subset: _Subset, conservative: bool, align_energies: bool, advance: Callable[[int], None]
) -> _ForceLabels:
    """Add the energies of one file to its subset; its forces are returned, since their sign is known only at its end."""
    report = ReadReport()
    labels = _ForceLabels()
    for blocks in _molecules(path, report):
        errors: list[np.ndarray] = []
        for block in blocks:
            held = [chemical_symbols[z] for z in evaluator.atomic_numbers if z in block.atomic_numbers]
            references = evaluator.self_energy_table(() if align_energies else held)[block.atomic_numbers].sum()
            composition = np.array([(block.atomic_numbers == z).sum() for z in evaluator.atomic_numbers], dtype=np.float64)
            for batch in _batches(block, evaluator):
                energies, direct, gradient = evaluator.run(batch, conservative and batch.forces is not None)
                # Labels are total energies; those of the model lack its self-energies.
                errors.append((energies.detach() - batch.energies).numpy() + references)
                if batch.forces is not None:
                    labels.add(batch.forces, direct, gradient)
                advance(len(batch.energies))
        of_molecule = np.concatenate(errors)
        subset.n_molecules += 1
        subset.energy_errors.append(of_molecule)
        subset.compositions.append(np.tile(composition, (len(of_molecule), 1)))
        subset.errors.add_sums("conformer_energy_difference", *pair_difference_sums(of_molecule))
    for reason, n in report.skipped.items():
        subset.skipped[reason] = subset.skipped.get(reason, 0) + n
    return labels


def _note(name: str, verdict: dict[str, Any]) -> str | None:
    """What a reader of the errors has to know about the forces of one file."""
    kind = verdict["force_labels"]
    if kind == "none":
        return f"{name}: no forces"
    how = f"correlation with the model's forces {verdict['force_label_correlation']:.3f}"
    if kind == "undetermined":
        return f"{name}: its forces resemble those of the model under neither sign ({how}); no error of forces is given"
    low, high = PLAUSIBLE_SLOPE
    size = abs(verdict["force_label_slope"])
    unit = "" if low <= size <= high else f"; they are {size:.2f} times as large as the model's: is their unit Hartree/Angstrom?"
    if kind == "gradients":
        return f"{name}: its 'forces' are gradients ({how}); their sign was changed{unit}"
    return f"{name}: {how}{unit}" if unit else None


def evaluate_folder(
    model: str,
    folder: Path,
    output: Path | None = None,
    conservative: bool = True,
    align_energies: bool = False,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """Errors of a model on COMP6, or on any folder of its layout; every frame counts, without a window of energy.

    Parameters
    ----------
    model : str
        A checkpoint (``.ckpt``), an exported file or the name of a released model.
    folder : Path
        Holds a folder of HDF5 files per subset, at any depth, or the files themselves.
    output : Path, optional
        Directory for ``metrics.json``; it must not hold one.
    conservative : bool
        Also differentiate the energy. The sign of the labels is then measured against conservative forces, else against direct ones.
    align_energies : bool
        Compare energies after removing, per element, what best maps one reference to the other, fitted over all subsets together.
    progress : callable, optional
        Called with the name of the file and the frames done so far.

    Returns
    -------
    dict
        ``subsets`` by name and ``all``, each with counts and errors in kcal/mol(/Angstrom) and meV(/Angstrom); per file what its ``forces``
        turned out to be; ``notes`` in words. A subset without forces, or with forces of which the sign is uncertain, has no errors of forces.

    Raises
    ------
    DataError, CheckpointError, ModelFileError
        For data and models that cannot be used.
    FileExistsError
        If `output` holds metrics already.
    """
    refuse_to_overwrite(output)
    paths = find_subsets(folder)
    evaluator = open_model(model)
    done = 0
    subsets: dict[str, _Subset] = {}
    notes: list[str] = []
    for name, files in paths.items():
        subset = subsets[name] = _Subset()
        for path in files:

            def advance(n_frames: int, file: str = path.name) -> None:
                nonlocal done
                done += n_frames
                if progress is not None:
                    progress(file, done)

            labels = _evaluate_file(path, evaluator, subset, conservative, align_energies, advance)
            verdict = subset.files[path.name] = labels.verdict()
            if verdict["force_labels"] in ("forces", "gradients"):
                for key, sums in (labels.as_stored if verdict["force_labels"] == "forces" else labels.negated).sums.items():
                    subset.errors.add_sums(key, *sums)
            note = _note(f"{name}/{path.name}", verdict)
            notes += [note] if note else []
    metrics = {**evaluator.description, "data": folder.name, "energies_aligned": align_energies, **_summary(subsets, align_energies), "notes": notes}
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def _summary(subsets: dict[str, _Subset], align_energies: bool) -> dict[str, Any]:
    """Errors of each subset and of all together."""
    shift = 0.0
    if align_energies:
        compositions = np.concatenate([c for s in subsets.values() for c in s.compositions])
        shift = np.linalg.lstsq(compositions, np.concatenate([e for s in subsets.values() for e in s.energy_errors]), rcond=None)[0]
    together = ErrorSums()
    results: dict[str, Any] = {}
    for name, subset in subsets.items():
        if not subset.n_molecules:
            raise DataError(f"{name}: no usable frame in {', '.join(subset.files)}; every one was skipped or the files are empty")
        composition = np.concatenate(subset.compositions)
        difference = np.concatenate(subset.energy_errors) - composition @ np.broadcast_to(shift, composition.shape[1])
        subset.errors.add("energy", torch.from_numpy(difference))
        subset.errors.add("energy_per_atom", torch.from_numpy(difference / composition.sum(1)))
        for key, sums in subset.errors.sums.items():
            together.add_sums(key, *sums)
        results[name] = {
            "n_molecules": subset.n_molecules,
            "n_frames": len(difference),
            "skipped": subset.skipped,
            "files": subset.files,
            **_errors(subset.errors),
        }
    whole = {k: sum(r[k] for r in results.values()) for k in ("n_molecules", "n_frames")}
    return {"subsets": results, "all": {**whole, **_errors(together)}}


def _errors(errors: ErrorSums) -> dict[str, float]:
    """Errors with units; molecules of one conformer each have no pairs, and so no error of them."""
    kept = ErrorSums()
    kept.sums = {k: s for k, s in errors.sums.items() if s[0]}
    return with_units(kept)


def comp6_table(metrics: dict[str, Any]) -> Table:
    """MAE / RMSE of `evaluate_folder` as a table, in the units in which COMP6 is reported."""
    table = Table("subset", "molecules", "frames", "energy", "conformer differences", "direct forces", "conservative forces", "labels")
    table.title = "MAE / RMSE in kcal/mol and kcal/mol/Å"
    for name, result in [*metrics["subsets"].items(), ("all", metrics["all"])]:
        cells = []
        for quantity in ("energy", "conformer_energy_difference", "force", "conservative_force"):
            unit = "kcal_per_mol" if "energy" in quantity else "kcal_per_mol_per_angstrom"
            mae, rmse = (result.get(f"{quantity}_{kind}_{unit}") for kind in ("mae", "rmse"))
            cells.append("-" if mae is None else f"{mae:.2f} / {rmse:.2f}")
        labels = ", ".join(sorted({f["force_labels"] for f in result.get("files", {}).values()}))
        table.add_row(name, f"{result['n_molecules']:,}", f"{result['n_frames']:,}", *cells, labels)
    return table
