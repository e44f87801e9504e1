"""Test error of a trained N-body network beside straight motion and what was printed, and a picture of trajectories."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.nbody.data import NBodyBatch, NBodyData
from training.nbody.fit import load_nbody
from training.nbody.network import NBodyTransformer
from training.nbody.simulate import SAVE_EVERY

N_SHOWN = 4  # trajectories of the picture


def _best_velocity_factor(data: NBodyData) -> float:
    """The factor w for which x + w v fits the training split best: the linear baseline of the EGNN paper."""
    above, below = 0.0, 0.0
    for batch in data.evaluation_batches("train"):
        v = batch.velocities.double()
        above += float((v * (batch.targets - batch.positions)).sum())
        below += float((v * v).sum())
    return above / below


def evaluate_nbody(checkpoint: Path, directory: Path, output: Path | None = None) -> dict[str, Any]:
    """Mean squared error of the positions asked for, over the test split.

    Parameters
    ----------
    checkpoint : Path
        Of `training.nbody.fit.fit_nbody`.
    directory : Path
        The trajectories, those that the network was trained on.
    output : Path, optional
        Directory for ``metrics.json`` and ``trajectories.png``.

    Returns
    -------
    dict
        ``test_mse`` with its standard error over the trajectories and its median, the same of straight motion, what was printed.

    Raises
    ------
    CheckpointError, DataError
        For unusable files.
    FileExistsError
        If `output` holds metrics already.
    ValueError
        If the network predicts another time ahead than the protocol of the trajectories asks for.
    """
    if output is not None and (output / "metrics.json").exists():
        raise FileExistsError(f"{output} holds metrics already; choose another output directory")
    network, config, step = load_nbody(checkpoint)
    data = NBodyData(directory)
    if network.time_ahead != data.time_ahead:
        raise ValueError(f"{checkpoint} predicts {network.time_ahead} ahead, the protocol of {directory} asks for {data.time_ahead}")
    factor = _best_velocity_factor(data)
    errors: dict[str, list[np.ndarray]] = {"network": [], "straight motion": [], "linear": []}
    with torch.no_grad():
        for batch in data.evaluation_batches("test"):
            predictions = {
                "network": network(batch.positions, batch.velocities, batch.charges),
                "straight motion": batch.positions + data.time_ahead * batch.velocities,
                "linear": batch.positions + factor * batch.velocities,
            }
            for name, prediction in predictions.items():
                errors[name].append((prediction - batch.targets).double().square().mean((1, 2)).numpy())
    per_trajectory = {name: np.concatenate(parts) for name, parts in errors.items()}
    n_test = len(per_trajectory["network"])
    metrics: dict[str, Any] = {
        "protocol": data.metadata["protocol"],
        "trajectories": {split: len(data.trajectories(split)) for split in data.protocol.trajectories},
        "data_seed": data.metadata["seed"],
        "start_step": data.protocol.start_step,
        "steps_ahead": data.protocol.steps_ahead,
        "parameters": sum(p.numel() for p in network.parameters()),
        "steps": step,
        "batch": config.batch,
        "test_mse": float(per_trajectory["network"].mean()),
        "test_mse_standard_error": float(per_trajectory["network"].std(ddof=1) / np.sqrt(n_test)),
        "test_mse_median": float(np.median(per_trajectory["network"])),
        "baselines_mse": {name: float(e.mean()) for name, e in per_trajectory.items() if name != "network"},
        "printed_mse": data.protocol.printed,
    }
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        plot_trajectories(network, data, output / "trajectories.png")
    return metrics


def plot_trajectories(network: NBodyTransformer, data: NBodyData, picture: Path) -> None:
    """Draw true paths and predicted positions of the first test trajectories, seen along z (Fig. 3.1 of the thesis).

    Where the protocol enters a trajectory at any frame, every saved frame gives a prediction; else the one frame does.
    """
    from matplotlib.figure import Figure

    ahead = data.frames_ahead
    n_frames = data.positions.shape[1]
    fixed = data.protocol.start_step
    frames = np.arange(n_frames - ahead) if fixed is None else np.array([fixed // SAVE_EVERY])
    shown = data.trajectories("test")[:N_SHOWN]
    figure = Figure(figsize=(4.2 * len(shown), 4.2), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)
    for axis, trajectory in zip(axes[0], shown, strict=True):
        batch: NBodyBatch = data.batch(np.full(len(frames), trajectory), frames)
        with torch.no_grad():
            predicted = network(batch.positions, batch.velocities, batch.charges).numpy()
        truth = data.positions[trajectory, frames[0] : frames[-1] + ahead + 1]
        for particle, charge in enumerate(data.charges[trajectory]):
            color = f"C{particle}"
            axis.plot(truth[:, particle, 0], truth[:, particle, 1], color=color, lw=1)
            axis.plot(truth[0, particle, 0], truth[0, particle, 1], "o", mfc="none", color=color)
            axis.plot(predicted[:, particle, 0], predicted[:, particle, 1], "x", color=color, ms=5)
            axis.annotate("+" if charge > 0 else "\N{MINUS SIGN}", truth[0, particle, :2], textcoords="offset points", xytext=(6, 4), color=color)
        error = float(np.mean(np.square(predicted - batch.targets.numpy())))
        axis.set(title=f"MSE {error:.4f}", xlabel="x", ylabel="y", aspect="equal")
    figure.suptitle(f"lines: true paths from the circle on; crosses: predicted {data.protocol.steps_ahead} steps ahead")
    figure.savefig(picture, dpi=110)
