"""From trajectories to batches of (what is known, what is asked for)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from training.data.frames import DataError
from training.nbody.protocol import PROTOCOLS, Protocol
from training.nbody.simulate import SAVE_EVERY, TIME_STEP, read_trajectories


@dataclass
class NBodyBatch:
    """Trajectories side by side.

    Attributes
    ----------
    positions, velocities : Tensor
        ``(n_trajectories, n_particles, 3)`` float32, known.
    charges : Tensor
        ``(n_trajectories, n_particles)``.
    targets : Tensor
        ``(n_trajectories, n_particles, 3)`` positions after the time asked for.
    trajectories : Tensor
        ``(n_trajectories,)`` int64, which ones of the data.
    """

    positions: Tensor
    velocities: Tensor
    charges: Tensor
    targets: Tensor
    trajectories: Tensor


class NBodyData:
    """Trajectories on disk, cut into splits and pairs of frames by a protocol.

    Parameters
    ----------
    directory : Path
        Of `training.nbody.simulate.write_trajectories`.

    Attributes
    ----------
    protocol : Protocol
        That the trajectories were made for.
    time_ahead : float
        Simulated time from what is known to what is asked for.

    Raises
    ------
    DataError
        If the trajectories are missing or fewer than the protocol needs.
    """

    def __init__(self, directory: Path) -> None:
        self.positions, self.velocities, self.charges, self.metadata = read_trajectories(directory)
        self.protocol: Protocol = PROTOCOLS[self.metadata["protocol"]]
        # A smaller set than the protocol's keeps the shares of its splits.
        share = min(1.0, len(self.positions) / self.protocol.n_trajectories)
        self._bounds: dict[str, tuple[int, int]] = {}
        start = 0
        for split, n in self.protocol.trajectories.items():
            stop = start + int(n * share)
            if stop == start:
                raise DataError(f"{directory}: {len(self.positions)} trajectories leave none for {split}; simulate more")
            self._bounds[split] = (start, stop)
            start = stop
        self.frames_ahead = self.protocol.steps_ahead // SAVE_EVERY
        self.time_ahead = self.protocol.steps_ahead * TIME_STEP

    def trajectories(self, split: str) -> np.ndarray:
        """Indices of the trajectories of ``train``, ``validation`` or ``test``."""
        return np.arange(*self._bounds[split])

    def starts(self, trajectories: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The frame at which each trajectory is entered."""
        if self.protocol.start_step is not None:
            return np.full(len(trajectories), self.protocol.start_step // SAVE_EVERY)
        return rng.integers(self.positions.shape[1] - self.frames_ahead, size=len(trajectories))

    def batch(self, trajectories: np.ndarray, frames: np.ndarray) -> NBodyBatch:
        """Known and asked-for frames of some trajectories, entered at `frames`."""
        known = [torch.from_numpy(a[trajectories, frames]) for a in (self.positions, self.velocities)]
        targets = torch.from_numpy(self.positions[trajectories, frames + self.frames_ahead])
        return NBodyBatch(known[0], known[1], torch.from_numpy(self.charges[trajectories]), targets, torch.from_numpy(trajectories))

    def evaluation_batches(self, split: str, size: int = 500) -> Iterator[NBodyBatch]:
        """Every trajectory of a split once, entered at the same frame at every call."""
        trajectories = self.trajectories(split)
        frames = self.starts(trajectories, np.random.default_rng(0))
        for begin in range(0, len(trajectories), size):
            yield self.batch(trajectories[begin : begin + size], frames[begin : begin + size])


class TrainingStream(IterableDataset):
    """Endless shuffled batches of the training split, the same from any batch on, whichever it starts with.

    Parameters
    ----------
    data : NBodyData
        The trajectories.
    size : int
        Trajectories in a batch.
    seed : int
        Of the shuffling and of the frames.
    start : int
        Batches to leave out at the beginning: those that a resumed run has seen.
    """

    def __init__(self, data: NBodyData, size: int, seed: int, start: int = 0) -> None:
        self.data, self.size, self.seed, self.start = data, size, seed, start

    def __iter__(self) -> Iterator[NBodyBatch]:
        rng = np.random.default_rng(self.seed)
        trajectories = self.data.trajectories("train")
        size = min(self.size, len(trajectories))
        to_leave_out = self.start
        while True:
            order = rng.permutation(trajectories)
            for begin in range(0, len(order) - size + 1, size):
                chosen = np.sort(order[begin : begin + size])  # sorted: neighbours on disk are read together
                frames = self.data.starts(chosen, rng)
                if to_leave_out > 0:
                    to_leave_out -= 1
                else:
                    yield self.data.batch(chosen, frames)
