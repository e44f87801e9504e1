"""Trajectories of charged particles: the simulation of the SE(3)-Transformer and EGNN papers, many trajectories at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from training.data.frames import DataError

N_PARTICLES = 5
TIME_STEP = 1e-3
N_STEPS = 4_901
SAVE_EVERY = 100
#: Speed of every particle at the start; directions are random, positions normal with standard deviation 1, charges +1 or -1.
INITIAL_SPEED = 0.5
#: Largest component of the force on a particle. Opposite charges that meet would otherwise leave with whatever speed the finite step gives
#: them. As in the published simulation it is a limit on each Cartesian component, so the rare encounter closer than 0.1 is not quite
#: equivariant, nor does it conserve momentum.
MAX_FORCE = 100.0

_CHUNK = 500  # trajectories at once: small enough for the processor's cache; part of the random stream, so never to be changed


def coulomb_forces(positions: np.ndarray, charges: np.ndarray) -> np.ndarray:
    """Forces q_i q_j r_ij / |r_ij|^3, summed over j and limited to `MAX_FORCE` by component.

    Parameters
    ----------
    positions : ndarray
        ``(3, n_particles, n_trajectories)``.
    charges : ndarray
        ``(n_particles, n_trajectories)``.

    Returns
    -------
    ndarray
        Same shape as `positions`.
    """
    n = positions.shape[1]
    i, j = np.triu_indices(n, 1)
    incidence = np.zeros((n, len(i)))
    incidence[i, np.arange(len(i))] = 1.0
    incidence[j, np.arange(len(j))] = -1.0
    difference = np.matmul(incidence.T, positions)
    squared = np.einsum("apt,apt->pt", difference, difference)
    difference *= charges[i] * charges[j] / (squared * np.sqrt(squared))
    return np.clip(np.matmul(incidence, difference), -MAX_FORCE, MAX_FORCE)


def simulate(n_trajectories: int, seed: int = 0, progress: Callable[[int, int], None] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Trajectories from random starts, by the leapfrog scheme in float64.

    Parameters
    ----------
    n_trajectories : int
        How many; the first ones are the same whatever the number.
    seed : int
        Of the starts.
    progress : callable, optional
        Called with the trajectories done and all of them.

    Returns
    -------
    tuple of ndarray
        Positions and velocities ``(n_trajectories, 50, n_particles, 3)`` float32, at steps 0, 100 .. 4900, and charges
        ``(n_trajectories, n_particles)`` float32. A velocity is that of the half step before its position.
    """
    n_frames = (N_STEPS - 1) // SAVE_EVERY + 1
    positions = np.empty((n_trajectories, n_frames, N_PARTICLES, 3), dtype=np.float32)
    velocities = np.empty_like(positions)
    all_charges = np.empty((n_trajectories, N_PARTICLES), dtype=np.float32)
    for start in range(0, n_trajectories, _CHUNK):
        chunk = slice(start, min(start + _CHUNK, n_trajectories))
        n = chunk.stop - chunk.start
        rng = np.random.default_rng([seed, start // _CHUNK])
        charges = rng.choice([-1.0, 1.0], size=(N_PARTICLES, _CHUNK))[:, :n]
        x = rng.normal(size=(3, N_PARTICLES, _CHUNK))[:, :, :n]
        v = rng.normal(size=(3, N_PARTICLES, _CHUNK))[:, :, :n]
        v *= INITIAL_SPEED / np.linalg.norm(v, axis=0)
        all_charges[chunk] = charges.T
        for step in range(N_STEPS):
            if step % SAVE_EVERY == 0:
                frame = step // SAVE_EVERY
                positions[chunk, frame], velocities[chunk, frame] = x.transpose(2, 1, 0), v.transpose(2, 1, 0)
            v = v + TIME_STEP * coulomb_forces(x, charges)
            x = x + TIME_STEP * v
        if progress is not None:
            progress(chunk.stop, n_trajectories)
    return positions, velocities, all_charges


def write_trajectories(directory: Path, protocol: str, n_trajectories: int, seed: int, progress: Callable[[int, int], None] | None = None) -> None:
    """Simulate and keep ``positions.npy``, ``velocities.npy``, ``charges.npy`` and ``metadata.json``.

    Raises
    ------
    FileExistsError
        If `directory` exists.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} exists already; choose another output directory or remove it")
    arrays = dict(zip(("positions", "velocities", "charges"), simulate(n_trajectories, seed, progress), strict=True))
    directory.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(directory / f"{name}.npy", array)
    metadata = {
        "protocol": protocol,
        "n_trajectories": n_trajectories,
        "seed": seed,
        "n_steps": N_STEPS,
        "save_every": SAVE_EVERY,
        "time_step": TIME_STEP,
        "max_force": MAX_FORCE,
    }
    (directory / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")


def read_trajectories(directory: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """Memory-mapped positions, velocities, charges as of `simulate`, and the metadata.

    Raises
    ------
    DataError
        If `directory` does not hold them.
    """
    try:
        metadata = json.loads((directory / "metadata.json").read_text())
        arrays = [np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("positions", "velocities", "charges")]
    except (OSError, ValueError) as error:
        raise DataError(f"{directory} holds no trajectories ({error}); make them with 'python -m training nbody simulate'") from None
    return arrays[0], arrays[1], arrays[2], metadata
