"""From frames to batches: sampling by size, neighbours, tensors."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL
from ase.data import chemical_symbols
from torch import Tensor

from training.data.frames import DataError
from training.data.packed import PackedDataset


@dataclass
class Batch:
    """Molecules side by side, atoms flattened, neighbours padded.

    Attributes
    ----------
    species : Tensor
        ``(n_atoms,)`` int64 species index.
    positions : Tensor
        ``(n_atoms, 3)`` float32, Angstrom.
    neighbors, mask : Tensor
        ``(n_atoms, max_neighbors)`` int64 index of the sender, and bool.
    molecule : Tensor
        ``(n_atoms,)`` int64, which molecule an atom belongs to.
    n_atoms_of : Tensor
        ``(n_molecules,)`` int64.
    energies : Tensor
        ``(n_molecules,)`` float64, relative to the self-energies, eV.
    forces : Tensor or None
        ``(n_atoms, 3)`` eV/Angstrom.
    frames : Tensor
        ``(n_molecules,)`` int64, where each molecule stands in the data set.
    """

    species: Tensor
    positions: Tensor
    neighbors: Tensor
    mask: Tensor
    molecule: Tensor
    n_atoms_of: Tensor
    energies: Tensor
    forces: Tensor | None
    frames: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            moved[f.name] = None if value is None else value.to(device)
        return Batch(**moved)

    def displacement(self, positions: Tensor) -> Tensor:
        """x_j - x_i of every slot, ``(n_atoms, max_neighbors, 3)``, for `positions` shaped as those of the batch."""
        return positions[self.neighbors] - positions.unsqueeze(1)


def padded_neighbors(positions: np.ndarray, offsets: np.ndarray, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours within `cutoff` inside each molecule.

    Parameters
    ----------
    positions : ndarray
        ``(n_atoms, 3)`` of all molecules.
    offsets : ndarray
        ``(n_molecules + 1,)`` first atom of each.
    cutoff : float
        In the unit of `positions`.

    Returns
    -------
    tuple of ndarray
        ``(n_atoms, max_neighbors)`` int64 indices, 0 on padding, and the bool mask. No pair is ever dropped.
    """
    sizes = np.diff(offsets)
    n_molecules, largest = len(sizes), int(sizes.max())
    valid = np.arange(largest) < sizes[:, None]
    padded = np.zeros((n_molecules, largest, 3), dtype=positions.dtype)
    padded[valid] = positions
    difference = padded[:, None, :, :] - padded[:, :, None, :]
    close = np.square(difference).sum(-1) < cutoff * cutoff
    close &= valid[:, None, :] & valid[:, :, None] & ~np.eye(largest, dtype=bool)
    rows = close[valid]
    counts = rows.sum(1)
    width = max(int(counts.max()), 1)
    order = np.argsort(~rows, axis=1, kind="stable")[:, :width]
    mask = np.arange(width) < counts[:, None]
    first = np.repeat(offsets[:-1], sizes)
    return np.where(mask, order + first[:, None], 0), mask


def assemble(
    species: np.ndarray,
    positions: np.ndarray,
    offsets: np.ndarray,
    energies: np.ndarray,
    forces: np.ndarray | None,
    frames: np.ndarray,
    cutoff: float,
) -> Batch:
    """Find the neighbours of molecules that lie side by side and make a `Batch` of them.

    Parameters
    ----------
    species, positions, forces : ndarray
        Of all atoms, as in `Batch`.
    offsets : ndarray
        ``(n_molecules + 1,)`` first atom of each molecule.
    energies, frames : ndarray
        Of each molecule, as in `Batch`.
    cutoff : float
        Angstrom.
    """
    neighbors, mask = padded_neighbors(positions, offsets, cutoff)
    sizes = np.diff(offsets)
    return Batch(
        species=torch.from_numpy(species),
        positions=torch.from_numpy(positions),
        neighbors=torch.from_numpy(neighbors),
        mask=torch.from_numpy(mask),
        molecule=torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
        n_atoms_of=torch.from_numpy(sizes),
        energies=torch.from_numpy(energies),
        forces=None if forces is None else torch.from_numpy(forces),
        frames=torch.from_numpy(np.asarray(frames, dtype=np.int64)),
    )


class Collator:
    """Make a `Batch` of frames.

    Parameters
    ----------
    dataset : PackedDataset
        The data.
    atomic_numbers : sequence of int
        Elements of the network, in the order of the species index.
    cutoff : float
        Angstrom.
    self_energies : ndarray, optional
        ``(256,)`` eV at each atomic number, to which the energies of a batch are relative; by default those of the data.

    Raises
    ------
    DataError
        If the data hold an element that the network lacks.
    """

    def __init__(self, dataset: PackedDataset, atomic_numbers: tuple[int, ...], cutoff: float, self_energies: np.ndarray | None = None) -> None:
        self.dataset = dataset
        self.cutoff = cutoff
        self.species_of = np.full(256, -1, dtype=np.int64)
        self.species_of[list(atomic_numbers)] = np.arange(len(atomic_numbers))
        self.self_energies = dataset.self_energies() if self_energies is None else self_energies
        unknown = [s for s in dataset.metadata["elements"] if self.species_of[NUMBER_OF_SYMBOL[s]] < 0]
        if unknown:
            known = ", ".join(chemical_symbols[z] for z in atomic_numbers)
            raise DataError(
                f"the data hold {', '.join(unknown)}, which the network does not know (it knows {known}): leave those molecules out; "
                "a training that starts from random weights learns them where network.elements names them, a trained model cannot"
            )

    def __call__(self, frames: np.ndarray) -> Batch:
        """Batch of the frames with these indices."""
        d = self.dataset
        starts, stops = d.offsets[frames], d.offsets[np.asarray(frames) + 1]
        sizes = stops - starts
        atoms = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        numbers = d.numbers[atoms]
        energies = d.energies[frames] - np.add.reduceat(self.self_energies[numbers], offsets[:-1])
        forces = None if d.forces is None else d.forces[atoms]
        return assemble(self.species_of[numbers], d.coordinates[atoms], offsets, energies, forces, frames, self.cutoff)


class SizeSampler:
    """Batches of molecules of similar size, so that padding wastes little; a pure function of seed and epoch.

    Parameters
    ----------
    frames : ndarray
        Indices to draw from.
    sizes : ndarray
        Number of atoms of each.
    batch_molecules : int
        Most molecules in a batch.
    batch_edges : int
        Most neighbour slots in a batch, estimated as n_atoms * min(n_atoms - 1, 50) per molecule: bounds memory and step time.
    seed : int
        Seed of the shuffling.
    """

    POOL = 50  # batches that are sorted by size together: large enough to fill well, small enough to stay random

    def __init__(self, frames: np.ndarray, sizes: np.ndarray, batch_molecules: int, batch_edges: int, seed: int) -> None:
        self.frames, self.sizes = frames, sizes
        self.batch_molecules, self.batch_edges, self.seed = batch_molecules, batch_edges, seed

    def epoch(self, number: int, shuffle: bool = True) -> list[np.ndarray]:
        """Batches of one epoch, each an array of frame indices."""
        rng = np.random.default_rng([self.seed, number])
        order = rng.permutation(len(self.frames)) if shuffle else np.argsort(self.sizes, kind="stable")
        batches: list[np.ndarray] = []
        pool = self.POOL * self.batch_molecules if shuffle else len(order)
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            part = part[np.argsort(self.sizes[part], kind="stable")]
            batches.extend(self._cut(part))
        if shuffle:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches

    def _cut(self, part: np.ndarray) -> Iterator[np.ndarray]:
        """Batches of nearly equally many: every batch weighs the same in the training, so molecules of a small one, the largest, would weigh more."""
        sizes = self.sizes[part].astype(np.int64)
        edges = np.concatenate([[0], np.cumsum(sizes * np.minimum(sizes - 1, 50))])
        most = -(-len(part) // -(-len(part) // self.batch_molecules))
        bounds = [0]
        while bounds[-1] < len(part):  # once per batch, not per molecule: an epoch has millions of these
            begin = bounds[-1]
            full = int(np.searchsorted(edges, edges[begin] + self.batch_edges, side="right")) - 1
            bounds.append(max(min(full, begin + most), begin + 1))
        if len(bounds) > 2:
            # Where edges bound them, what is left for the last may be little: it shares with the one before.
            even = (bounds[-3] + bounds[-1]) // 2
            least = int(np.searchsorted(edges, edges[-1] - self.batch_edges))
            bounds[-2] = min(bounds[-2], max(even, least))
        for begin, stop in itertools.pairwise(bounds):
            yield self.frames[part[begin:stop]]

    def stream(self, start_batch: int) -> Iterator[np.ndarray]:
        """Endless stream of batches that begins at batch `start_batch` of the whole training."""
        epoch, seen = 0, 0
        while True:
            batches = self.epoch(epoch)
            if seen + len(batches) > start_batch:
                yield from batches[max(start_batch - seen, 0) :]
            seen += len(batches)
            epoch += 1
