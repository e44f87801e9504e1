"""Writing a packed data set: frames stream to its arrays; self-energies, statistics and splits come at the end."""

import contextlib
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ase.data import chemical_symbols
from scipy.spatial.distance import pdist

from training.data.frames import DataError, FrameBlock
from training.data.molecules import Frames, frames_with_held_out_molecules
from training.data.packed import ARRAYS, FORMAT_VERSION, PackedDataset
from training.data.self_energy import SelfEnergyFit, check_residual, require_all_elements
from training.data.splits import LEFT_OUT, NOT_GIVEN, SPLITS, complete_split, split_of
from training.lock import LOCK, alone

#: Frames whose numbers are in memory at once.
CHUNK = 100_000
#: Angstrom; frames whose coordinates are equal on this grid are copies, in whatever format and precision they were written.
SAME = 1e-3
#: Angstrom; the shortest bond there is, that of H2, has 0.74. And of how many frames the closest atoms are looked at.
CLOSEST, LOOKED_AT = 0.3, 500
#: Forces of a frame, against the median frame, beyond which they are no forces of molecules.
STRANGE_FORCES = 100.0


def _statistics(count: int, total: float, total_square: float) -> dict[str, float]:
    mean = total / count
    return {"mean": mean, "std": float(np.sqrt(max(total_square / count - mean * mean, 0.0)))}


def force_statistics(squares: np.ndarray, n_atoms: np.ndarray, trained: np.ndarray) -> dict[str, Any]:
    """Root mean square of the force components of frames trained on, by which forces are scaled, and how many of them are beyond all others.

    One frame with absurd forces among a thousand would make the scale thousands of times too large, and so hide itself from a loss that
    counts errors in units of it. So frames whose root mean square is more than `STRANGE_FORCES` times the median one are left out of the scale.

    Parameters
    ----------
    squares, n_atoms : ndarray
        ``(n_frames,)``: mean square of the force components (eV^2/Angstrom^2), and number of atoms.
    trained : ndarray
        ``(n_frames,)`` bool.
    """
    limit = STRANGE_FORCES**2 * np.median(squares[trained])
    strange = trained & (squares > limit) if limit > 0 else np.zeros_like(trained)
    usual = trained & ~strange
    rms = float(np.sqrt(np.sum(squares * n_atoms, where=usual, dtype=np.float64) / np.sum(n_atoms, where=usual, dtype=np.float64)))
    return {"force_rms": rms, "strange_forces": int(strange.sum()), "first_strange_forces": np.flatnonzero(strange)[:5].tolist()}


@dataclass
class _Splits:
    """Which frames are trained on, choose a model, test it, or are left out.

    Attributes
    ----------
    of_frames : ndarray
        ``(n_frames,)`` uint8 index into `SPLITS`, or `LEFT_OUT`.
    of_formulas : dict
        Split of each formula, as `split_of` has it.
    with_array : bool
        Whether the formula does not decide, so that the frames' own are written.
    split_by, fractions, seed
        As in `PackedWriter.close`.
    left_out_of : dict
        Number of frames left out of each split, if any were looked for.
    """

    of_frames: np.ndarray
    of_formulas: dict[str, str]
    with_array: bool
    split_by: str
    fractions: dict[str, float]
    seed: int
    left_out_of: dict[str, int]

    def described(self) -> dict[str, Any]:
        """Plain data for the metadata."""
        out = {
            "split_by": self.split_by,
            "splits": None if self.with_array else self.of_formulas,
            "with_split_array": self.with_array,
            "split_fractions": self.fractions,
            "split_seed": self.seed,
            "split_frames": {s: int((self.of_frames == i).sum()) for i, s in enumerate(SPLITS)},
            "split_sha256": hashlib.sha256(self.of_frames.tobytes()).hexdigest(),
        }
        if self.left_out_of:
            out |= {"hold_out_molecules": True, "left_out_frames": sum(self.left_out_of.values()), "left_out_of": self.left_out_of}
        return out


class PackedWriter:
    """Write frame blocks as they stream by; of each frame some bytes stay in memory, besides one block.

    Parameters
    ----------
    directory : Path
        Where the data set will be. It must not exist; it appears only once it is complete.
    with_forces : bool
        Whether every block has forces.

    Raises
    ------
    FileExistsError
        If `directory` exists, or another process is about to make it.
    """

    def __init__(self, directory: Path, with_forces: bool) -> None:
        if directory.exists():
            raise FileExistsError(f"{directory} exists already; choose another output directory or remove it")
        self.directory = directory
        self._partial = directory.with_name(directory.name + ".partial")
        self._partial.mkdir(parents=True, exist_ok=True)
        self._locked = contextlib.ExitStack()
        self._locked.enter_context(alone(self._partial, f"another process prepares {directory}"))
        for left in self._partial.iterdir():  # by one that was killed
            if left.name != LOCK:
                left.unlink()
        self.with_forces = with_forces
        names = [n for n in ARRAYS if n != "split" and (n != "forces" or with_forces)]
        self._files: dict[str, BinaryIO] = {n: open(self._partial / f"{n}.bin", "wb") for n in names}  # noqa: SIM115
        self._formulas: dict[str, int] = {}
        self._composition: list[np.ndarray] = []
        self._given: list[np.ndarray] = []
        self._force_squares: list[np.ndarray] = []
        self._n_frames = 0
        self._n_atoms = 0
        self._hash = hashlib.sha256()
        self._put("offsets", np.zeros(1, dtype=np.int64))

    def _put(self, name: str, array: np.ndarray) -> None:
        dtype, _ = ARRAYS[name]
        data = np.ascontiguousarray(array, dtype=dtype).tobytes()
        self._files[name].write(data)
        if name != "offsets":
            self._hash.update(data)

    def add(self, block: FrameBlock, split: str | None = None) -> None:
        """Append the frames of `block`, to a split of their own where one is given."""
        n_frames, n_atoms = block.coordinates.shape[:2]
        index = self._formulas.setdefault(block.formula, len(self._formulas))
        if index == len(self._composition):
            self._composition.append(block.atomic_numbers)
        self._put("numbers", np.tile(block.atomic_numbers, n_frames))
        self._put("coordinates", block.coordinates)
        self._put("energies", block.energies)
        self._put("formula_index", np.full(n_frames, index))
        self._put("offsets", self._n_atoms + n_atoms * np.arange(1, n_frames + 1))
        if self.with_forces:
            assert block.forces is not None
            self._put("forces", block.forces)
            self._force_squares.append(np.square(block.forces, dtype=np.float64).mean((1, 2)).astype(np.float32))
        self._given.append(np.full(n_frames, NOT_GIVEN if split is None else SPLITS.index(split), dtype=np.uint8))
        self._n_frames += n_frames
        self._n_atoms += n_frames * n_atoms

    @property
    def n_frames(self) -> int:
        """Frames written so far."""
        return self._n_frames

    def close(
        self,
        self_energies: dict[int, float] | None,
        origin: str,
        fractions: dict[str, float],
        seed: int,
        extra: dict[str, Any],
        split_by: str = "formula",
        hold_out_molecules: bool = False,
    ) -> PackedDataset:
        """Subtract self-energies in the statistics, assign splits and make the directory appear.

        Parameters
        ----------
        self_energies : dict or None
            Atomic number to eV; None for a least-squares fit to the frames trained on, or to all where those do not determine it.
        origin : str
            How the self-energies were come by: ``least squares``, ``table`` or ``isolated atoms``.
        fractions, seed
            See `split_of`.
        extra : dict
            Further metadata (sources, what was skipped).
        split_by : str
            ``formula``, see `split_of`, or ``frame``, see `split_frames`.
        hold_out_molecules : bool
            Leave frames that have a molecule of a formula of a later split, alone or as one of several, out of the training and validation splits.

        Returns
        -------
        PackedDataset
            The finished data set.

        Raises
        ------
        DataError
            If nothing was written, nothing is left to train on, an element has no self-energy or the residual is absurd. The partial data
            are removed.
        """
        try:
            for file in self._files.values():
                file.close()
            if self._n_frames == 0:
                raise DataError("no usable frame in the input; every one was skipped or the files are empty")
            index = np.fromfile(self._partial / "formula_index.bin", dtype=np.int32)
            splits = self._assign_splits(index, fractions, seed, split_by, hold_out_molecules)
            trained = splits.of_frames == SPLITS.index("train")
            fit, elements = self._fit_self_energies(index, trained)
            table = fit.solve() if self_energies is None else self_energies
            require_all_elements(table, elements, origin)
            statistics = self._checked_statistics(table, origin, index, trained)
            self._check_lengths()
            metadata = {
                "format_version": FORMAT_VERSION,
                "units": {"length": "Angstrom", "energy": "eV", "force": "eV/Angstrom"},
                "n_frames": self._n_frames,
                "n_atoms": self._n_atoms,
                "elements": [chemical_symbols[z] for z in elements],
                # Those of elements that these data lack, too: a model that starts from another knows them.
                "self_energies": {chemical_symbols[z]: table[z] for z in sorted(table)},
                "self_energies_origin": origin,
                "self_energies_determined": origin != "least squares" or fit.determined,
                "statistics": statistics,
                "with_forces": self.with_forces,
                "formulas": list(self._formulas),
                **splits.described(),
                "sha256": self._hash.hexdigest(),
                **extra,
            }
            (self._partial / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
            self._partial.rename(self.directory)
            self._locked.close()
            (self.directory / LOCK).unlink(missing_ok=True)
        except BaseException:
            self.discard()
            raise
        return PackedDataset(self.directory)

    def _assign_splits(self, index: np.ndarray, fractions: dict[str, float], seed: int, split_by: str, hold_out_molecules: bool) -> _Splits:
        """Give each frame, whose formula `index` tells, to a split, and write which where the formula alone does not say it."""
        formulas = {f: split_of(f, fractions, seed) for f in self._formulas}
        given = np.concatenate(self._given)
        split = np.array([SPLITS.index(s) for s in formulas.values()], dtype=np.uint8)[index]
        with_array = split_by == "frame" or bool((given != NOT_GIVEN).any())
        if with_array:
            split = complete_split(given, self._identities(), None if split_by == "frame" else split, fractions, seed)
        left_out_of: dict[str, int] = {}
        if hold_out_molecules:
            left_out = frames_with_held_out_molecules(self._frames(), list(formulas), split)
            left_out_of = {s: int((split[left_out] == SPLITS.index(s)).sum()) for s in ("train", "validation")}
            split[left_out] = LEFT_OUT
            with_array = with_array or bool(left_out.any())
        if with_array:
            (self._partial / "split.bin").write_bytes(split.tobytes())
        if not (split == SPLITS.index("train")).any():
            remedy = "give other fractions or another seed, or split few molecules frame by frame, with --split-by frame"
            if hold_out_molecules and (split == LEFT_OUT).any():
                remedy = f"{(split == LEFT_OUT).sum()} frames hold such molecules; leave --hold-out-molecules out, or hold other files out"
            raise DataError(
                f"the split leaves no frame to train on: of {len(formulas)} formulas all are held out (validation, test: {fractions}); {remedy}"
            )
        return _Splits(split, formulas, with_array, split_by, fractions, seed, left_out_of)

    def _fit_self_energies(self, index: np.ndarray, trained: np.ndarray) -> tuple[SelfEnergyFit, list[int]]:
        """Least squares over the frames trained on, or over all where those are of too few formulas; and the elements of all."""
        fit, everything = self._fit(index, trained), self._fit(index, np.ones_like(trained))
        if not fit.determined or fit.elements != everything.elements:
            fit = everything  # the energies of others would be off by thousands of eV
        return fit, everything.elements

    def _checked_statistics(self, table: dict[int, float], origin: str, index: np.ndarray, trained: np.ndarray) -> dict[str, Any]:
        """Of energies and forces; a DataError where the self-energies leave more than molecules are bound by."""
        statistics = self._energy_statistics(table, trained)
        residual = statistics["residual_per_atom"]
        try:
            check_residual(residual["mean"], residual["std"], origin)
        except DataError as error:
            raise DataError(f"{error} {self._farthest(table, index)}") from None
        if self.with_forces:
            sizes = np.array([len(z) for z in self._composition], dtype=np.int16)
            statistics |= force_statistics(np.concatenate(self._force_squares), sizes[index], trained)
        return statistics

    def _frames(self) -> Frames:
        """What was written of the frames' molecules."""

        def mapped(name: str) -> np.ndarray:
            dtype, shape = ARRAYS[name]
            return np.memmap(self._partial / f"{name}.bin", dtype=dtype, mode="r").reshape(-1, *shape)

        return Frames(*(mapped(name) for name in Frames._fields))

    def _identities(self) -> np.ndarray:
        """A number for each frame, ``(n_frames,)`` uint64, from a hash of its elements and its coordinates on a grid."""
        data = self._frames()
        out = np.zeros(self._n_frames, dtype=np.uint64)
        for i in range(self._n_frames):
            atoms = slice(data.offsets[i], data.offsets[i + 1])
            on_grid = np.rint(data.coordinates[atoms] / SAME).astype(np.int64)
            digest = hashlib.sha256(data.numbers[atoms].tobytes() + on_grid.tobytes()).digest()
            out[i] = int.from_bytes(digest[:8], "big")
        return out

    def _check_lengths(self) -> None:
        """Refuse coordinates that are not in Angstrom, as far as the closest atoms of some frames tell."""
        data = self._frames()
        several = np.flatnonzero(np.diff(data.offsets) > 1)
        looked_at = several[np.unique(np.linspace(0, len(several) - 1, LOOKED_AT).astype(int))] if len(several) else several
        closest = [pdist(data.coordinates[data.offsets[i] : data.offsets[i + 1]].astype(float)).min() for i in looked_at]
        if closest and np.median(closest) < CLOSEST:
            raise DataError(
                f"the closest atoms of a frame are {np.median(closest):.3f} Angstrom apart in the middle of {len(closest)} frames, nearer than in "
                "any molecule; coordinates must be in Angstrom: are they in nm?"
            )

    def _fit(self, formula_index: np.ndarray, chosen: np.ndarray) -> SelfEnergyFit:
        """Least squares over the chosen frames, ``(n_frames,)`` bool."""
        energies = np.memmap(self._partial / "energies.bin", dtype=np.float64, mode="r")
        n_frames, total = np.zeros(len(self._composition), dtype=int), np.zeros(len(self._composition))
        for start in range(0, self._n_frames, CHUNK):
            part = slice(start, start + CHUNK)
            index = formula_index[part][chosen[part]]
            n_frames += np.bincount(index, minlength=len(total))
            total += np.bincount(index, energies[part][chosen[part]], minlength=len(total))
        fit = SelfEnergyFit()
        for atomic_numbers, n, energy in zip(self._composition, n_frames, total, strict=True):
            fit.add(atomic_numbers, int(n), float(energy))
        return fit

    def _energy_statistics(self, table: dict[int, float], trained: np.ndarray) -> dict[str, Any]:
        """Mean and standard deviation of energies with and without self-energies (the thesis' Table 3.1), eV.

        Of all frames, but for the last, by which energies are scaled: that is of those trained on.
        """
        per_element = np.zeros(256)
        for z, e in table.items():
            per_element[z] = e
        numbers = np.memmap(self._partial / "numbers.bin", dtype=np.uint8, mode="r")
        energies = np.memmap(self._partial / "energies.bin", dtype=np.float64, mode="r")
        offsets = np.memmap(self._partial / "offsets.bin", dtype=np.int64, mode="r")
        sums = {name: np.zeros(2) for name in ("total", "residual", "residual_per_atom", "residual_per_sqrt_atom")}
        for start in range(0, self._n_frames, CHUNK):
            stop = min(start + CHUNK, self._n_frames)
            first = offsets[start:stop] - offsets[start]
            references = np.add.reduceat(per_element[numbers[offsets[start] : offsets[stop]]], first)
            n = np.diff(offsets[start : stop + 1])
            residual = energies[start:stop] - references
            learned = trained[start:stop]
            for name, values in (
                ("total", energies[start:stop]),
                ("residual", residual),
                ("residual_per_atom", residual / n),
                ("residual_per_sqrt_atom", (residual / np.sqrt(n))[learned]),
            ):
                sums[name] += values.sum(), np.square(values).sum()
        count = {"residual_per_sqrt_atom": int(trained.sum())}
        out: dict[str, Any] = {name: _statistics(count.get(name, self._n_frames), *s) for name, s in sums.items()}
        out["residual_per_sqrt_atom"]["rms"] = float(np.sqrt(sums["residual_per_sqrt_atom"][1] / trained.sum()))
        return out

    def _farthest(self, table: dict[int, float], formula_index: np.ndarray) -> str:
        """The frames that are farthest from the median one, by energy per atom without self-energies."""
        sizes = np.array([len(numbers) for numbers in self._composition])
        references = np.array([sum(table[int(z)] for z in numbers) for numbers in self._composition])
        energies = np.fromfile(self._partial / "energies.bin", dtype=np.float64)
        residual = (energies - references[formula_index]) / sizes[formula_index]
        off = residual - np.median(residual)
        formulas = list(self._formulas)
        worst = [f"{i} ({formulas[formula_index[i]]}) by {off[i]:.4g}" for i in np.argsort(-np.abs(off))[:3]]
        return f"Farthest from the median, in eV per atom, are frames {', '.join(worst)}, of all files; remove them if they alone are wrong."

    def discard(self) -> None:
        """Remove what was written so far."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # of a full disk, which refuses the rest of a buffer too
                file.close()
        shutil.rmtree(self._partial, ignore_errors=True)
        self._locked.close()
