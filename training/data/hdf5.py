"""Readers of the two HDF5 layouts of the ANI data sets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL

from training.data.frames import DataError, FrameBlock, ReadReport, hill_formula, keep_finite
from training.units import energy_factor, force_factor, length_factor

_BLOCK = 4096  # frames read at once: bounds the memory whatever the size of a group


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: not a readable HDF5 file ({error}); it may be truncated or of another kind: copy it again") from error


def _groups(node: h5py.Group, needed: str) -> Iterator[h5py.Group]:
    """Every group below `node`, depth first, that holds the data set `needed`."""
    if needed in node and isinstance(node[needed], h5py.Dataset):
        yield node
    for key in node:
        if node.get(key, getclass=True) is h5py.Group:  # asks without opening: a release holds some 20 data sets per group
            yield from _groups(node[key], needed)


def _dataset(group: h5py.Group, key: str, path: Path) -> h5py.Dataset:
    if key not in group:
        raise DataError(f"{path}: group {group.name} has no data set {key!r}; it holds {', '.join(sorted(group))}. Name the right key.")
    return group[key]


def _label_key(file: h5py.File, attribute: str, of_the_release: str) -> str:
    """Which data set holds a label, as far as the file tells."""
    first = next(_groups(file, "coordinates"), None)
    ending = of_the_release[of_the_release.index(".") :]
    endings = [] if first is None else [key for key in first if key.endswith(ending)]
    only = endings[0] if len(endings) == 1 else of_the_release
    return str(file.attrs.get(attribute, only))


def _expect_shape(data: h5py.Dataset, expected: tuple[int | None, ...], path: Path) -> None:
    matches = len(data.shape) == len(expected) and all(e is None or e == s for e, s in zip(expected, data.shape, strict=True))
    if not matches:
        shown = tuple("any" if e is None else e for e in expected)
        raise DataError(f"{path}: {data.name} has shape {data.shape}, expected {shown}")


def _check_unit(data: h5py.Dataset, configured: str, factor: Any, path: Path) -> None:
    """Refuse a data set whose own ``units`` attribute contradicts the unit that was asked for."""
    stated = data.attrs.get("units")
    if stated is None:
        return
    text = str(stated.decode() if isinstance(stated, bytes) else stated).split("(")[0].strip()
    try:
        same = np.isclose(factor(text), factor(configured), rtol=1e-6)
    except ValueError as error:
        raise DataError(f"{path}: {data.name} states its units as {text!r}: {error}") from error
    if not same:
        raise DataError(f"{path}: {data.name} states its units as {text!r}, but {configured!r} was asked for; pass the unit of the file")


def _finite_blocks(
    path: Path,
    report: ReadReport,
    atomic_numbers: np.ndarray,
    coordinates: h5py.Dataset,
    energies: h5py.Dataset,
    energy_in_ev: float,
    forces: h5py.Dataset | None,
    force_in_ev_per_angstrom: float,
) -> Iterator[FrameBlock]:
    """Read one group some thousand frames at a time, convert units, leave out what is not finite."""
    formula = hill_formula(atomic_numbers)
    for start in range(0, coordinates.shape[0], _BLOCK):
        part = slice(start, start + _BLOCK)
        try:
            block = FrameBlock(
                formula=formula,
                atomic_numbers=atomic_numbers,
                coordinates=np.asarray(coordinates[part], dtype=np.float32),
                energies=np.asarray(energies[part], dtype=np.float64) * energy_in_ev,
                forces=None if forces is None else (np.asarray(forces[part], dtype=np.float64) * force_in_ev_per_angstrom).astype(np.float32),
                group=coordinates.parent.name,
            )
        except OSError as error:
            where = coordinates.parent.name
            raise DataError(f"{path}: cannot read {where} ({error}); the file is damaged or cut off: copy it again") from error
        kept = keep_finite(block, report)
        if kept is not None:
            yield kept


def read_ani1x(
    path: Path,
    report: ReadReport,
    energy_key: str = "auto",
    force_key: str | None = "auto",
    energy_unit: str = "Hartree",
    force_unit: str = "Hartree/Angstrom",
) -> Iterator[FrameBlock]:
    """Stream a file in the layout of the ANI-1x release.

    One group per formula with ``atomic_numbers`` ``(n_atoms,)``, ``coordinates`` ``(n_frames, n_atoms, 3)`` in Angstrom and one
    data set per property; NaN marks what was not computed (Smith et al., Sci. Data 7, 134 (2020)).

    Parameters
    ----------
    path : Path
        The HDF5 file.
    report : ReadReport
        Filled on the way.
    energy_key, force_key : str
        Data sets with the labels; `force_key` None for energies alone. ``auto``: what the file's attributes of these names say, as
        `training.label` writes them, else those of the release, ``wb97x_dz.energy`` and ``wb97x_dz.forces``, else the only ones of
        the first group whose names end so.
    energy_unit, force_unit : str
        Units of the labels, compared with each data set's ``units`` attribute where there is one.

    Yields
    ------
    FrameBlock
        At most some thousand frames at a time.

    Raises
    ------
    DataError
        For a missing key, a wrong shape, a contradicting unit, or an unreadable or truncated file.
    """
    e_factor, f_factor = energy_factor(energy_unit), force_factor(force_unit)
    with _open(path) as file:
        level = file.attrs.get("level_of_theory")
        report.labelled_by(level.decode() if isinstance(level, bytes) else level)
        if energy_key == "auto":
            energy_key = _label_key(file, "energy_key", "wb97x_dz.energy")
        if force_key == "auto":
            force_key = _label_key(file, "force_key", "wb97x_dz.forces")
        found = False
        for group in _groups(file, "coordinates"):
            found = True
            coordinates = group["coordinates"]
            _expect_shape(coordinates, (None, None, 3), path)
            _check_unit(coordinates, "Angstrom", length_factor, path)
            n_frames, n_atoms, _ = coordinates.shape
            numbers = _dataset(group, "atomic_numbers", path)
            _expect_shape(numbers, (n_atoms,), path)
            energies = _dataset(group, energy_key, path)
            _expect_shape(energies, (n_frames,), path)
            _check_unit(energies, energy_unit, energy_factor, path)
            forces = None if force_key is None else _dataset(group, force_key, path)
            if forces is not None:
                _expect_shape(forces, (n_frames, n_atoms, 3), path)
                _check_unit(forces, force_unit, force_factor, path)
            atomic_numbers = np.asarray(numbers[()], dtype=np.uint8)
            yield from _finite_blocks(path, report, atomic_numbers, coordinates, energies, e_factor, forces, f_factor)
        if not found:
            raise DataError(f"{path}: no group with 'coordinates' in it; expected the layout of the ANI-1x release")


def read_ani1(
    path: Path,
    report: ReadReport,
    energy_unit: str = "Hartree",
    high_energy: bool = False,
    force_key: str | None = None,
    force_unit: str = "Hartree/Angstrom",
) -> Iterator[FrameBlock]:
    """Stream a file in the layout of the ANI-1 release: one group per molecule, ``species`` as strings, ``energies``.

    COMP6 comes in the same layout and adds ``forces`` (see `training.comp6` for what they really are).

    Parameters
    ----------
    path, report
        As in `read_ani1x`.
    energy_unit : str
        Unit of ``energies``.
    high_energy : bool
        Also read ``coordinatesHE`` and ``energiesHE``.
    force_key : str or None
        Data set with the forces, read from the groups that have it.
    force_unit : str
        Its unit.

    Yields
    ------
    FrameBlock
        With ``forces`` None where there are none.

    Raises
    ------
    DataError
        As `read_ani1x`.
    """
    factor, f_factor = energy_factor(energy_unit), force_factor(force_unit)
    with _open(path) as file:
        found = False
        for group in _groups(file, "species"):
            found = True
            symbols = [s.decode() if isinstance(s, bytes) else str(s) for s in group["species"][()]]
            unknown = sorted({s for s in symbols if s not in NUMBER_OF_SYMBOL})
            if unknown:
                raise DataError(f"{path}: {group.name}/species holds {', '.join(unknown)}, which are no chemical symbols")
            atomic_numbers = np.array([NUMBER_OF_SYMBOL[s] for s in symbols], dtype=np.uint8)
            for suffix in ("", "HE") if high_energy else ("",):
                coordinates = _dataset(group, "coordinates" + suffix, path)
                _expect_shape(coordinates, (None, len(symbols), 3), path)
                energies = _dataset(group, "energies" + suffix, path)
                _expect_shape(energies, (coordinates.shape[0],), path)
                _check_unit(energies, energy_unit, energy_factor, path)
                forces = group[force_key] if force_key is not None and not suffix and force_key in group else None
                if forces is not None:
                    _expect_shape(forces, coordinates.shape, path)
                    _check_unit(forces, force_unit, force_factor, path)
                yield from _finite_blocks(path, report, atomic_numbers, coordinates, energies, factor, forces, f_factor)
        if not found:
            raise DataError(f"{path}: no group with 'species' in it; expected the layout of the ANI-1 release")


def detect_layout(path: Path) -> str:
    """Tell the layout of a data file: ``"ani1x"``, ``"ani1"`` or ``"extxyz"``.

    Raises
    ------
    DataError
        If the file is none of these.
    """
    if path.suffix.lower() in (".xyz", ".extxyz"):
        return "extxyz"
    with _open(path) as file:
        group = next(_groups(file, "coordinates"), None)
        if group is not None and "species" in group:
            return "ani1"
        if group is not None and "atomic_numbers" in group:
            return "ani1x"
    raise DataError(f"{path}: neither the ANI-1x layout (atomic_numbers, coordinates) nor the ANI-1 layout (species, coordinates)")
