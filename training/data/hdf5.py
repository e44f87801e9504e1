"""Readers of the two HDF5 layouts of the ANI data sets."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL
from ase.data import chemical_symbols

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


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """What h5py raises at a damaged place, as a `DataError`: it knows many kinds."""
    try:
        yield
    except DataError:
        raise
    except (KeyError, IndexError, RuntimeError, OSError, ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error}); the file is damaged or cut off: copy it again") from error


def _atomic_numbers(values: np.ndarray, group: h5py.Group, path: Path) -> np.ndarray:
    """Of one group, as bytes."""
    if values.dtype.kind not in "iu" or not ((values >= 1) & (values < len(chemical_symbols))).all():
        raise DataError(f"{path}: {group.name}/atomic_numbers holds {values.tolist()[:5]}; they must be from 1 to {len(chemical_symbols) - 1}")
    return values.astype(np.uint8)


def _numbers_of_species(group: h5py.Group, path: Path) -> np.ndarray:
    """Of one group of the ANI-1 layout, as bytes."""
    symbols = [s.decode() if isinstance(s, bytes) else str(s) for s in group["species"][()]]
    unknown = sorted({s for s in symbols if s not in NUMBER_OF_SYMBOL})
    if unknown:
        raise DataError(f"{path}: {group.name}/species holds {', '.join(unknown)}, which are no chemical symbols")
    return np.array([NUMBER_OF_SYMBOL[s] for s in symbols], dtype=np.uint8)


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


def _partner(key: str, ending: str, other: str, path: Path) -> str:
    """The data set of the other label of the same calculation, as ``wb97x_tz.forces`` goes with ``wb97x_tz.energy``."""
    if not key.endswith(ending):
        raise DataError(f"{path}: {key!r} alone does not tell which {other[1:]} belong to it; name both, or ask for energies alone")
    return key.removesuffix(ending) + other


def _expect_shape(data: h5py.Dataset, expected: tuple[int | None, ...], path: Path) -> None:
    matches = len(data.shape) == len(expected) and all(e is None or e == s for e, s in zip(expected, data.shape, strict=True))
    if not matches:
        shown = tuple("any" if e is None else e for e in expected)
        raise DataError(f"{path}: {data.name} has shape {data.shape}, expected {shown}")


def _length_in_angstrom(coordinates: h5py.Dataset, path: Path) -> float:
    """By its ``units`` attribute, without which it is in Angstrom."""
    stated = _stated_unit(coordinates)
    try:
        return 1.0 if stated is None else length_factor(stated)
    except ValueError as error:
        raise DataError(f"{path}: {coordinates.name} states its units as {stated!r}: {error}") from error


def _stated_unit(data: h5py.Dataset) -> str | None:
    stated = data.attrs.get("units")
    return None if stated is None else str(stated.decode() if isinstance(stated, bytes) else stated).split("(")[0].strip()


def _check_unit(data: h5py.Dataset, configured: str, factor: Any, path: Path) -> None:
    """Refuse a data set whose own ``units`` attribute contradicts the unit that was asked for."""
    text = _stated_unit(data)
    if text is None:
        return
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
    length_in_angstrom: float,
) -> Iterator[FrameBlock]:
    """Read one group some thousand frames at a time, convert units, leave out what is not finite."""
    formula = hill_formula(atomic_numbers)
    for start in range(0, coordinates.shape[0], _BLOCK):
        part = slice(start, start + _BLOCK)
        block = FrameBlock(
            formula=formula,
            atomic_numbers=atomic_numbers,
            coordinates=np.asarray(coordinates[part], dtype=np.float32) * np.float32(length_in_angstrom),
            energies=np.asarray(energies[part], dtype=np.float64) * energy_in_ev,
            forces=None if forces is None else (np.asarray(forces[part], dtype=np.float64) * force_in_ev_per_angstrom).astype(np.float32),
            group=coordinates.parent.name,
        )
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
        Data sets with the labels; `force_key` None for energies alone. ``auto``: that of the same level as the other, ``tz.forces`` with
        ``tz.energy``; where neither is named, what the file's attributes of these names say, as `training.label` writes them, else those of the
        release, ``wb97x_dz.energy`` and ``wb97x_dz.forces``, else the only ones of the first group whose names end so.
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
    with _damage_told(path), _open(path) as file:
        level = file.attrs.get("level_of_theory")
        report.labelled_by(level.decode() if isinstance(level, bytes) else level)
        if force_key == "auto":
            force_key = _label_key(file, "force_key", "wb97x_dz.forces") if energy_key == "auto" else _partner(energy_key, ".energy", ".forces", path)
        elif force_key is not None and energy_key == "auto":
            energy_key = _partner(force_key, ".forces", ".energy", path)
        if energy_key == "auto":
            energy_key = _label_key(file, "energy_key", "wb97x_dz.energy")
        found = False
        for group in _groups(file, "coordinates"):
            found = True
            coordinates = group["coordinates"]
            _expect_shape(coordinates, (None, None, 3), path)
            length = _length_in_angstrom(coordinates, path)
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
            atomic_numbers = _atomic_numbers(np.asarray(numbers[()]), group, path)
            yield from _finite_blocks(path, report, atomic_numbers, coordinates, energies, e_factor, forces, f_factor, length)
        if not found:
            raise DataError(f"{path}: no group with 'coordinates' in it; expected the layout of the ANI-1x release")


def read_ani1(
    path: Path,
    report: ReadReport,
    energy_unit: str = "Hartree",
    force_key: str | None = None,
    energy_key: str = "energies",
) -> Iterator[FrameBlock]:
    """Stream a file in the layout of the ANI-1 release: one group per molecule, ``species`` as strings, ``energies``.

    COMP6 comes in the same layout and adds ``forces`` (see `training.comp6` for what they really are).

    Parameters
    ----------
    path, report
        As in `read_ani1x`.
    energy_unit : str
        Unit of ``energies``.
    force_key : str or None
        Data set with the forces, in Hartree/Angstrom, read from the groups that have it.
    energy_key : str
        Data set with the energies.

    Yields
    ------
    FrameBlock
        With ``forces`` None where there are none.

    Raises
    ------
    DataError
        As `read_ani1x`.
    """
    force_unit = "Hartree/Angstrom"
    factor, f_factor = energy_factor(energy_unit), force_factor(force_unit)
    with _damage_told(path), _open(path) as file:
        found = False
        for group in _groups(file, "species"):
            found = True
            atomic_numbers = _numbers_of_species(group, path)
            coordinates = _dataset(group, "coordinates", path)
            _expect_shape(coordinates, (None, len(atomic_numbers), 3), path)
            energies = _dataset(group, energy_key, path)
            _expect_shape(energies, (coordinates.shape[0],), path)
            _check_unit(energies, energy_unit, energy_factor, path)
            forces = group[force_key] if force_key is not None and force_key in group else None
            if forces is not None:
                _expect_shape(forces, coordinates.shape, path)
                _check_unit(forces, force_unit, force_factor, path)
            length = _length_in_angstrom(coordinates, path)
            yield from _finite_blocks(path, report, atomic_numbers, coordinates, energies, factor, forces, f_factor, length)
        if not found:
            raise DataError(f"{path}: no group with 'species' in it; expected the layout of the ANI-1 release")


def formulas_of_hdf5(path: Path) -> set[str]:
    """Formulas of all groups of a file in the layout of ANI-1x or ANI-1, whose labels are not looked at; errors as those of the readers."""
    with _damage_told(path), _open(path) as file:
        return {
            hill_formula(_numbers_of_species(g, path) if "species" in g else _atomic_numbers(_dataset(g, "atomic_numbers", path)[()], g, path))
            for g in _groups(file, "coordinates")
        }


def detect_layout(path: Path) -> str:
    """Tell the layout of a data file: ``"ani1x"``, ``"ani1"`` or ``"extxyz"``.

    Raises
    ------
    DataError
        If the file is none of these.
    """
    if path.suffix.lower() in (".xyz", ".extxyz"):
        return "extxyz"
    with _damage_told(path), _open(path) as file:
        group = next(_groups(file, "coordinates"), None)
        if group is not None and "species" in group:
            return "ani1"
        if group is not None and "atomic_numbers" in group:
            return "ani1x"
    raise DataError(f"{path}: neither the ANI-1x layout (atomic_numbers, coordinates) nor the ANI-1 layout (species, coordinates)")
