"""Labelled frames as an HDF5 file in the layout of the ANI-1x release, with units and provenance."""

from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np

from training.data.frames import hill_formula
from training.files import replacing
from training.label.journal import LabelledFrame
from training.units import energy_factor, force_factor

ENERGY_KEY, FORCE_KEY = "label.energy", "label.forces"
_BLOCK = 128
_ENERGY_UNIT, _FORCE_UNIT = "Hartree", "Hartree/Angstrom"  # those of the ANI-1x release


class _Group:
    """Frames of one formula on their way into the file, some hundred at a time."""

    def __init__(self, file: h5py.File, formula: str, numbers: np.ndarray, with_disagreement: bool) -> None:
        group = file.create_group(formula)
        group["atomic_numbers"] = numbers
        text = h5py.string_dtype()
        n = len(numbers)
        columns: dict[str, tuple[tuple[int, ...], object, str | None]] = {
            "coordinates": ((n, 3), np.float32, "Angstrom"),
            ENERGY_KEY: ((), np.float64, _ENERGY_UNIT),
            FORCE_KEY: ((n, 3), np.float32, _FORCE_UNIT),
            "molecule": ((), text, None),
            "source": ((), text, None),
        }
        if with_disagreement:
            columns["committee.force_std"] = ((), np.float32, _FORCE_UNIT)
        self._data = {}
        self._waiting: dict[str, list] = {name: [] for name in columns}
        for name, (shape, dtype, unit) in columns.items():
            self._data[name] = group.create_dataset(name, (0, *shape), maxshape=(None, *shape), dtype=dtype, chunks=(64, *shape))
            if unit is not None:
                self._data[name].attrs["units"] = unit

    def add(self, frame: LabelledFrame, order: np.ndarray) -> None:
        values = {
            "coordinates": frame.candidate.atoms.positions[order],
            ENERGY_KEY: frame.energy / energy_factor(_ENERGY_UNIT),
            FORCE_KEY: frame.forces[order] / force_factor(_FORCE_UNIT),
            "molecule": frame.candidate.molecule,
            "source": frame.candidate.source,
            "committee.force_std": None if frame.disagreement is None else frame.disagreement / force_factor(_FORCE_UNIT),
        }
        for name, waiting in self._waiting.items():
            waiting.append(values[name])
        if len(self._waiting["source"]) == _BLOCK:
            self.flush()

    def flush(self) -> None:
        for name, waiting in self._waiting.items():
            if waiting:
                data = self._data[name]
                old = data.shape[0]
                data.resize(old + len(waiting), axis=0)
                data[old:] = np.array(waiting, dtype=object) if data.dtype == object else np.array(waiting)
                waiting.clear()


def write_ani1x(path: Path, frames: Iterable[LabelledFrame], attributes: dict[str, str], with_disagreement: bool) -> int:
    """Write frames; the file appears only once it is complete.

    Within a formula all frames share their order of elements, so atoms are sorted by atomic number.

    Parameters
    ----------
    path : Path
        File to make.
    frames : iterable of LabelledFrame
        Streamed; at most some hundred frames per formula are held.
    attributes : dict
        Provenance, stored as attributes of the file; `training.data.hdf5.read_ani1x` learns from ``energy_key`` and ``force_key`` where the
        labels are.
    with_disagreement : bool
        Whether to store what the committee said.

    Returns
    -------
    int
        Number of frames.
    """
    groups: dict[str, _Group] = {}
    n = 0
    with replacing(path) as partial, h5py.File(partial, "w") as file:
        for name, value in {**attributes, "energy_key": ENERGY_KEY, "force_key": FORCE_KEY}.items():
            file.attrs[name] = value
        for frame in frames:
            numbers = frame.candidate.atoms.numbers
            order = np.argsort(numbers, kind="stable")
            formula = hill_formula(numbers)
            if formula not in groups:
                groups[formula] = _Group(file, formula, numbers[order].astype(np.uint8), with_disagreement)
            groups[formula].add(frame, order)
            n += 1
        for group in groups.values():
            group.flush()
    return n
