"""`evaluate`: a checkpoint or an exported file on any supported data; MAE, RMSE, parity plot, JSON."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL
from torch import Tensor, nn

from openmm_se3.model_file import load_model
from training.checkpoint import load_checkpoint
from training.data.batches import Batch, Collator, SizeSampler
from training.data.frames import DataError
from training.data.packed import PackedDataset
from training.data.prepare import prepare
from training.loss import ErrorSums, predict
from training.network.rigid import remove_net_force_and_torque
from training.predictions import Prediction, write_predictions
from training.units import ANGSTROM_PER_NM, KCAL_PER_MOL_PER_EV, KJ_PER_MOL_PER_EV


@dataclass
class Evaluator:
    """One interface to a checkpoint and to an exported file.

    Attributes
    ----------
    atomic_numbers : tuple of int
        Elements in the order of the species index.
    cutoff : float
        Angstrom.
    self_energies : dict
        Symbol to eV: what the model's energies are relative to.
    run : callable
        Takes a batch and whether to differentiate the energy; gives energies ``(n_molecules,)`` in eV, direct forces ``(n_atoms, 3)``
        in eV/Angstrom and the conservative ones or None.
    name : str
        Of the model.
    description : dict
        What metrics say of it; ``untrained`` among it, as in `ModelMetadata`.
    """

    atomic_numbers: tuple[int, ...]
    cutoff: float
    self_energies: dict[str, float]
    run: Callable[[Batch, bool], tuple[Tensor, Tensor, Tensor | None]]
    name: str
    description: dict[str, Any] = field(default_factory=dict)

    def self_energy_table(self, symbols: Iterable[str]) -> np.ndarray:
        """Self-energy in eV at each atomic number, ``(256,)`` float64, zero where there is none.

        Parameters
        ----------
        symbols : iterable of str
            Elements whose total energies are wanted.

        Raises
        ------
        DataError
            If one of these has no self-energy.
        """
        missing = [s for s in symbols if s not in self.self_energies]
        if missing:
            raise DataError(
                f"{self.name} has no self-energy of {', '.join(missing)}: its training data held none, so that it knows no total energies there. "
                "Compare energies after fitting them (evaluate: --align-energies), or take a model trained on data with these elements"
            )
        table = np.zeros(256)
        for symbol, energy in self.self_energies.items():
            table[NUMBER_OF_SYMBOL[symbol]] = energy
        return table


def _each_molecule(batch: Batch) -> Iterator[slice]:
    start = 0
    for n in batch.n_atoms_of.tolist():
        yield slice(start, start + n)
        start += n


def _checkpoint_evaluator(path: Path) -> Evaluator:
    loaded = load_checkpoint(path)
    network: nn.Module = loaded.network

    def run(batch: Batch, conservative: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.no_grad():
            energies, direct, gradient = predict(network, batch, conservative, create_graph=False)
            pieces = [remove_net_force_and_torque(direct[s], batch.positions[s], True) for s in _each_molecule(batch)]
        return energies, torch.cat(pieces), gradient

    numbers = tuple(NUMBER_OF_SYMBOL[s] for s in loaded.config.network.elements)
    description = {"checkpoint": path.name, "steps": loaded.step, "untrained": loaded.untrained}
    return Evaluator(numbers, loaded.config.network.cutoff, loaded.data["self_energies"], run, path.stem, description)


def _exported_evaluator(path: str) -> Evaluator:
    model = load_model(path)
    metadata = model.metadata
    numbers = tuple(NUMBER_OF_SYMBOL[s] for s in metadata.elements)
    of_species = torch.tensor(numbers)

    def run(batch: Batch, conservative: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        energies, direct, gradient = [], [], []
        for s in _each_molecule(batch):
            x = batch.positions[s].to(torch.float64) / ANGSTROM_PER_NM
            z = of_species[batch.species[s]]
            if not conservative:
                e, f = model(x, z, None)
            elif hasattr(model, "conservative_and_direct"):
                e, g, f = model.conservative_and_direct(x, z, None)
            else:
                leaf = x.clone().requires_grad_(True)
                e, f = model.energy_and_forces(leaf, z, None)
                g = -torch.autograd.grad([e], [leaf])[0]
            energies.append(e.detach() / KJ_PER_MOL_PER_EV)
            direct.append(f / KJ_PER_MOL_PER_EV / ANGSTROM_PER_NM)
            if conservative:
                gradient.append(g / KJ_PER_MOL_PER_EV / ANGSTROM_PER_NM)
        return torch.stack(energies), torch.cat(direct), torch.cat(gradient) if conservative else None

    self_energies = {s: e / KJ_PER_MOL_PER_EV for s, e in metadata.self_energies.items()}
    description = {"model": metadata.name, "untrained": metadata.untrained}
    return Evaluator(numbers, metadata.cutoff_nm * ANGSTROM_PER_NM, self_energies, run, metadata.name, description)


def open_model(model: str) -> Evaluator:
    """A checkpoint (``.ckpt``), an exported file or a released model behind one interface; errors as those of their readers."""
    path = Path(model)
    return _checkpoint_evaluator(path) if path.suffix == ".ckpt" else _exported_evaluator(model)


def refuse_to_overwrite(output: Path | None) -> None:
    """Raise FileExistsError if `output` holds metrics already, and make it: an OSError comes before an evaluation, not after it."""
    if output is None:
        return
    if (output / "metrics.json").exists():
        raise FileExistsError(f"{output} holds metrics already; choose another output directory")
    output.mkdir(parents=True, exist_ok=True)


def evaluate(
    model: str,
    data: Path,
    split: str = "all",
    output: Path | None = None,
    conservative: bool = True,
    align_energies: bool = False,
    max_frames: int | None = None,
    predictions: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **reading: Any,
) -> dict[str, Any]:
    """Errors of a model on labelled data.

    Parameters
    ----------
    model : str
        A checkpoint (``.ckpt``), an exported file or the name of a released model.
    data : Path
        A packed data set, or any file that `prepare` reads.
    split : str
        ``all``, or ``train``, ``validation`` or ``test`` of a packed data set.
    output : Path, optional
        Directory for ``metrics.json`` and ``parity.png``, which has the forces that the model was trained for; it must not hold a ``metrics.json``.
    conservative : bool
        Also differentiate the energy.
    align_energies : bool
        Compare energies after removing, per element, what best maps one reference to the other: for labels of another
        level of theory or with other self-energies. The metrics say so.
    max_frames : int, optional
        Evaluate that many frames, evenly spaced.
    predictions : bool
        Also write ``predictions.xyz`` to `output`, as `write_predictions`.
    progress : callable, optional
        Called with the frames done and all frames.
    **reading
        Keys and units for files that are not packed, as in `training.data.prepare.open_blocks`.

    Returns
    -------
    dict
        Errors in kcal/mol and kcal/mol/Angstrom, and in meV; counts; what was evaluated on what.

    Raises
    ------
    DataError, CheckpointError, ModelFileError
        For data and models that cannot be used.
    FileExistsError
        If `output` holds metrics already.
    OSError
        If `output` cannot be made.
    ValueError
        If predictions are asked for without an `output`.
    """
    if predictions and output is None:
        raise ValueError("predictions are written to the output directory: name one (--output)")
    refuse_to_overwrite(output)
    evaluator = open_model(model)
    with tempfile.TemporaryDirectory() as scratch:
        if data.is_dir():
            dataset = PackedDataset(data)
        else:
            if split != "all":
                raise DataError(f"{data} is not a packed data set and has no split {split!r}; evaluate all of it")
            # Total energies are compared below, so any self-energies will do; a fit needs no isolated atoms and no table.
            dataset = prepare([data], Path(scratch) / "packed", self_energies="least-squares", validation=0.0, **reading)
        return _evaluate_packed(evaluator, dataset, data, split, output, conservative, align_energies, max_frames, predictions, progress)


def _evaluate_packed(
    evaluator: Evaluator,
    dataset: PackedDataset,
    data: Path,
    split: str,
    output: Path | None,
    conservative: bool,
    align_energies: bool,
    max_frames: int | None,
    keep: bool,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    frames = dataset.indices(split)
    if max_frames is not None and len(frames) > max_frames:
        frames = frames[np.linspace(0, len(frames) - 1, max_frames).astype(int)]
    if len(frames) == 0:
        raise DataError(f"{data}: no frame in split {split!r}")
    # Labels and model may have been given different self-energies: compare total energies, in float64.
    references = evaluator.self_energy_table(() if align_energies else dataset.metadata["elements"])
    collate = Collator(dataset, evaluator.atomic_numbers, evaluator.cutoff, references)
    with_forces = dataset.forces is not None
    sampler = SizeSampler(frames, np.diff(dataset.offsets)[frames], 100, 25_000, 0)
    errors = ErrorSums()
    kept: list[tuple[int, np.ndarray, np.ndarray | None]] = []
    labels: list[np.ndarray] = []
    predictions: list[np.ndarray] = []
    compositions: list[np.ndarray] = []
    force_pairs: dict[str, list[np.ndarray]] = {}
    done = 0
    for indices in sampler.epoch(0, shuffle=False):
        batch = collate(indices)
        energies, direct, gradient = evaluator.run(batch, conservative and with_forces)
        labels.append(batch.energies.numpy())
        predictions.append(energies.detach().numpy())
        counts = torch.zeros(len(indices), len(evaluator.atomic_numbers), dtype=torch.float64)
        compositions.append(counts.index_put((batch.molecule, batch.species), torch.ones(1, dtype=torch.float64), accumulate=True).numpy())
        if batch.forces is not None:
            errors.add("force", direct - batch.forces)
            if gradient is not None:
                errors.add("conservative_force", gradient - batch.forces)
                errors.add("direct_minus_conservative_force", direct - gradient)
            for kind, forces in (("direct", direct), ("conservative", gradient)):
                drawn = output is not None and kind not in evaluator.description.get("untrained", ())
                if drawn and forces is not None:
                    pairs = np.stack([batch.forces.numpy().ravel(), forces.detach().numpy().ravel()])
                    force_pairs.setdefault(kind, []).append(pairs)
        if keep:
            for frame, atoms in zip(indices, _each_molecule(batch), strict=True):
                kept.append((int(frame), direct[atoms].detach().numpy(), None if gradient is None else gradient[atoms].numpy()))
        done += len(indices)
        if progress is not None:
            progress(done, len(frames))
    label, prediction, composition = np.concatenate(labels), np.concatenate(predictions), np.concatenate(compositions)
    n_atoms = composition.sum(1)
    difference = prediction - label
    if align_energies:
        difference = difference - composition @ np.linalg.lstsq(composition, difference, rcond=None)[0]
    errors.add("energy", torch.from_numpy(difference))
    errors.add("energy_per_atom", torch.from_numpy(difference / n_atoms))
    metrics: dict[str, Any] = {
        **evaluator.description,
        "data": data.name,
        "data_sha256": dataset.metadata["sha256"],
        "split": split,
        "n_frames": len(frames),
        "n_formulas": len(dataset.formulas_of(frames)),
        "energies_aligned": align_energies,
    }
    metrics |= with_units(errors)
    if output is not None:
        (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        pairs_of = {kind: np.concatenate(pairs, axis=1) for kind, pairs in force_pairs.items()}
        plot_parity(label, label + difference, pairs_of, output / "parity.png")
        if keep:
            of_frames = [Prediction(frame, float(e), direct, gradient) for (frame, direct, gradient), e in zip(kept, difference, strict=True)]
            write_predictions(output / "predictions.xyz", dataset, of_frames)
    return metrics


def with_units(errors: ErrorSums) -> dict[str, float]:
    """MAE and RMSE with the unit in the key: kcal/mol(/Angstrom), to compare with the thesis and ANI, and meV(/Angstrom)."""
    out = {}
    for name, value in errors.result().items():
        per_length = "" if "energy" in name else "_per_angstrom"
        out[f"{name}_kcal_per_mol{per_length}"] = value * KCAL_PER_MOL_PER_EV
        out[f"{name}_mev{per_length}"] = value * 1e3
    return out


def plot_parity(labels: np.ndarray, predictions: np.ndarray, forces: dict[str, np.ndarray], picture: Path) -> None:
    """Draw predicted against labelled energies and force components of each kind, with RMSE in the title; eV in, kcal/mol out."""
    from matplotlib.figure import Figure

    panels = [("energy relative to self-energies (kcal/mol)", labels, predictions)]
    panels += [(f"{kind} force component (kcal/mol/Å)", pair[0], pair[1]) for kind, pair in forces.items()]
    figure = Figure(figsize=(5.5 * len(panels), 5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, x, y) in zip(axes[0], panels, strict=True):
        x, y = x * KCAL_PER_MOL_PER_EV, y * KCAL_PER_MOL_PER_EV
        rmse = float(np.sqrt(np.mean(np.square(x - y))))
        axis.hexbin(x, y, gridsize=150, bins="log", mincnt=1, cmap="viridis")
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axis.plot(ends, ends, color="black", lw=0.7)
        axis.set(xlabel=f"label: {title}", ylabel="model", title=f"RMSE {rmse:.2f}", aspect="equal")
    figure.savefig(picture, dpi=130)
