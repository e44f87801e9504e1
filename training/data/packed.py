"""The packed data set: flat arrays on disk, memory-mapped, one directory.

::

    metadata.json        units, self-energies, statistics, sources, formulas, splits
    numbers.bin          (total_atoms,) uint8
    coordinates.bin      (total_atoms, 3) float32, Angstrom
    forces.bin           (total_atoms, 3) float32, eV/Angstrom; absent for energies alone
    energies.bin         (n_frames,) float64 total energies, eV
    offsets.bin          (n_frames + 1,) int64, first atom of each frame
    formula_index.bin    (n_frames,) int32 into metadata["formulas"]
    split.bin            (n_frames,) uint8 into SPLITS; only of data that are split frame by frame, or have splits of their own
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL

from training.data.frames import DataError
from training.data.molecules import Frames, parts_by_formula
from training.data.splits import SPLITS, split_frames

FORMAT_VERSION = 1
#: eV per square root of an atom. As many frames as compositions are fitted without a residual, and nothing can be divided by that.
LEAST_ENERGY_SPREAD = 1e-3

#: Type of each file, and shape of what it holds of an atom or a frame.
ARRAYS: dict[str, tuple[type, tuple[int, ...]]] = {
    "numbers": (np.uint8, ()),
    "coordinates": (np.float32, (3,)),
    "forces": (np.float32, (3,)),
    "energies": (np.float64, ()),
    "offsets": (np.int64, ()),
    "formula_index": (np.int32, ()),
    "split": (np.uint8, ()),
}


class PackedDataset:
    """A finished packed data set, memory-mapped.

    Parameters
    ----------
    directory : Path
        What `training.data.packing.PackedWriter.close` made.

    Attributes
    ----------
    metadata : dict
        Contents of ``metadata.json``.
    offsets, numbers, coordinates, energies, forces, formula_index : ndarray
        The arrays of the module's docstring; `forces` is None without forces.
    split : ndarray or None
        Of data that are split frame by frame, or have splits of their own, ``(n_frames,)`` index into `SPLITS`.

    Raises
    ------
    DataError
        If a file is missing, has the wrong size, or is of another format version.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        try:
            self.metadata: dict[str, Any] = json.loads((self.directory / "metadata.json").read_text())
        except FileNotFoundError:
            raise DataError(f"{self.directory} is not a packed data set (no metadata.json); make one with 'python -m training prepare'") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{self.directory}/metadata.json is damaged ({error}); prepare the data again") from None
        version = self.metadata.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(f"{self.directory}: packed format {version}, expected {FORMAT_VERSION}; prepare the data again")
        n_frames, n_atoms = self.metadata["n_frames"], self.metadata["n_atoms"]
        self.offsets = self._map("offsets", n_frames + 1)
        self.numbers = self._map("numbers", n_atoms)
        self.coordinates = self._map("coordinates", n_atoms)
        self.energies = self._map("energies", n_frames)
        self.formula_index = self._map("formula_index", n_frames)
        self.forces = self._map("forces", n_atoms) if self.metadata["with_forces"] else None
        self.split = None
        if self.metadata.get("with_split_array"):
            self.split = self._map("split", n_frames)
        elif self.metadata.get("split_by") == "frame":
            # Packed before copies were looked for; models were trained with that split.
            self.split = split_frames(np.arange(n_frames), self.metadata["split_fractions"], self.metadata["split_seed"], fill=False)

    def _map(self, name: str, length: int) -> np.ndarray:
        dtype, shape = ARRAYS[name]
        path = self.directory / f"{name}.bin"
        expected = length * int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
        size = path.stat().st_size if path.exists() else -1
        if size != expected:
            raise DataError(f"{path}: {size} bytes, expected {expected}; the data set is damaged: prepare it again")
        return np.memmap(path, dtype=dtype, mode="r", shape=(length, *shape))

    def __len__(self) -> int:
        return int(self.metadata["n_frames"])

    def indices(self, split: str) -> np.ndarray:
        """Frames of one split (``train``, ``validation``, ``test``) or of ``all``."""
        if split == "all":
            return np.arange(len(self))
        if split not in SPLITS:
            raise DataError(f"split must be one of {', '.join(SPLITS)} or all, got {split!r}")
        if self.split is not None:
            return np.flatnonzero(self.split == SPLITS.index(split))
        chosen = np.array([self.metadata["splits"][f] == split for f in self.metadata["formulas"]])
        return np.flatnonzero(chosen[self.formula_index])

    def frames_of_trained_formulas(self, split: str) -> int:
        """How many frames of a split are of formulas that the training split has, too."""
        trained = np.unique(self.formula_index[self.indices("train")])
        return int(np.isin(self.formula_index[self.indices(split)], trained).sum())

    def frames_tested_on_parts(self) -> int:
        """How many frames of the test split have a formula that training frames have as one of several molecules."""
        tested = self.indices("test")
        if not len(tested):
            return 0
        data = Frames(self.numbers, self.coordinates, self.offsets, self.formula_index)
        parts: set[str] = set()
        for _, found in parts_by_formula(data, self.indices("train")):
            parts.update(*found)
        known = [i for i, formula in enumerate(self.metadata["formulas"]) if formula in parts]
        return int(np.isin(self.formula_index[tested], known).sum())

    def formulas_of(self, frames: np.ndarray) -> set[str]:
        """Formulas that frames ``(n,)`` have."""
        return {str(self.metadata["formulas"][i]) for i in np.unique(self.formula_index[frames])}

    def formula(self, frame: int) -> str:
        """Formula of one frame."""
        return str(self.metadata["formulas"][self.formula_index[frame]])

    def _residuals(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Energies of frames relative to the self-energies ``(n_frames,)`` eV, counts of each atomic number in each formula, and their formulas."""
        _, first = np.unique(self.formula_index, return_index=True)
        counts = np.array([np.bincount(self.numbers[self.offsets[f] : self.offsets[f + 1]], minlength=256) for f in first], dtype=np.float64)
        of_frame = self.formula_index[frames]
        return self.energies[frames] - (counts @ self.self_energies())[of_frame], counts, of_frame

    def energy_shift(self) -> np.ndarray:
        """Energy in eV at each atomic number that a network had best start with, ``(256,)`` float64.

        Against free atoms, molecules are bound by several eV per atom. Least squares over the training frames, of minimum norm where compositions
        do not determine it; zero where the self-energies are such a fit already.
        """
        frames = self.indices("train")
        if self.metadata["self_energies_origin"] == "least squares" or len(frames) == 0:
            return np.zeros(256)
        residuals, counts, of_frame = self._residuals(frames)
        n_frames = np.bincount(of_frame, minlength=len(counts))
        weight = np.sqrt(n_frames)  # one row for each formula, as if each of its frames had one
        mean = np.bincount(of_frame, residuals, minlength=len(counts)) / np.maximum(n_frames, 1)
        return np.linalg.lstsq(weight[:, None] * counts, weight * mean, rcond=1e-9)[0]

    def energy_spread(self, shift: np.ndarray) -> float:
        """Root mean square of the energies relative to self-energies and `shift`, eV per square root of an atom, at least `LEAST_ENERGY_SPREAD`.

        Parameters
        ----------
        shift : ndarray
            ``(256,)`` eV at each atomic number.
        """
        frames = self.indices("train")
        if not shift.any() or len(frames) == 0:
            return max(self.metadata["statistics"]["residual_per_sqrt_atom"]["rms"], LEAST_ENERGY_SPREAD)
        residuals, counts, of_frame = self._residuals(frames)
        square = np.square(residuals - (counts @ shift)[of_frame]) / counts.sum(1)[of_frame]
        return max(float(np.sqrt(square.mean())), LEAST_ENERGY_SPREAD)

    def self_energies(self) -> np.ndarray:
        """Self-energy in eV at each atomic number, ``(256,)`` float64."""
        table = np.zeros(256)
        for symbol, energy in self.metadata["self_energies"].items():
            table[NUMBER_OF_SYMBOL[symbol]] = energy
        return table
