"""`prepare`: files of quantum chemistry in, one packed data set out."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL
from ase.data import chemical_symbols

from training.data.extxyz import formulas_of_extxyz, read_extxyz
from training.data.frames import DataError, FrameBlock, ReadReport
from training.data.hdf5 import detect_layout, formulas_of_hdf5, read_ani1, read_ani1x
from training.data.packed import PackedDataset
from training.data.packing import PackedWriter
from training.units import energy_factor

if TYPE_CHECKING:
    from training.align import LevelShift, ModelReference

LAYOUTS = ("auto", "ani1x", "ani1", "extxyz")
#: Units of energies and forces that do not state their own, by layout.
UNITS = {
    "ani1x": ("Hartree", "Hartree/Angstrom"),
    "ani1": ("Hartree", "Hartree/Angstrom"),
    "extxyz": ("eV", "eV/Angstrom"),
}
#: Fraction that is held out to choose a model, where nothing else is said.
VALIDATION = 0.05


def open_blocks(
    path: Path,
    report: ReadReport,
    layout: str = "auto",
    energy_key: str | None = None,
    force_key: str | None = None,
    energy_unit: str | None = None,
    force_unit: str | None = None,
    energies_only: bool = False,
) -> Iterator[FrameBlock]:
    """Stream any supported data file; keys and units default to those of its layout.

    Raises
    ------
    DataError
        As the readers, and if forces are asked of the ANI-1 layout, which has none.
    """
    if layout not in LAYOUTS:
        raise DataError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    kind = detect_layout(path) if layout == "auto" else layout
    if kind == "ani1":
        if force_key is not None or force_unit is not None:
            raise DataError(
                f"{path}: of the ANI-1 layout energies alone are read, so give no key or unit of forces; files of it that have some do not "
                "agree on their sign"
            )
        return read_ani1(path, report, energy_unit or UNITS[kind][0], energy_key=energy_key or "energies")
    options: dict[str, Any] = {"energy_unit": energy_unit or UNITS[kind][0], "force_unit": force_unit or UNITS[kind][1]}
    options |= {k: v for k, v in (("energy_key", energy_key), ("force_key", force_key)) if v is not None}
    if energies_only:
        options["force_key"] = None
    return (read_ani1x if kind == "ani1x" else read_extxyz)(path, report, **options)


def formulas_of_file(path: Path) -> set[str]:
    """Formulas of the molecules of any supported data file, whatever its labels are called.

    Raises
    ------
    DataError
        If the file is missing, of another kind or damaged.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return (formulas_of_extxyz if detect_layout(path) == "extxyz" else formulas_of_hdf5)(path)


def units_of(layouts: Collection[str], energy_unit: str | None, force_unit: str | None, with_forces: bool) -> dict[str, str]:
    """In which units labels are read that do not state their own; those of each layout, where several are read."""
    energies = " or ".join(sorted({energy_unit or UNITS[kind][0] for kind in layouts}))
    forces = " or ".join(sorted({force_unit or UNITS[kind][1] for kind in layouts}))
    return {"energies": energies} | ({"forces": forces} if with_forces else {})


def read_self_energy_table(path: Path) -> dict[int, float]:
    """Read ``{"unit": "Hartree", "H": -0.6, ...}`` from a JSON file into atomic number to eV; of a packed data set, its self-energies.

    Raises
    ------
    DataError
        If the file is no such table, holds what is not finite, or the directory is no packed data set.
    """
    if path.is_dir():
        return {NUMBER_OF_SYMBOL[symbol]: energy for symbol, energy in PackedDataset(path).metadata["self_energies"].items()}
    try:
        table = json.loads(path.read_text())
        factor = energy_factor(table.pop("unit"))
        energies = {NUMBER_OF_SYMBOL[symbol]: float(value) * factor for symbol, value in table.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f'{path}: expected a JSON table such as {{"unit": "Hartree", "H": -0.60, "C": -38.08}}; got an error: {error!r}') from None
    strange = [chemical_symbols[z] for z, energy in energies.items() if not np.isfinite(energy)]
    if strange:
        raise DataError(f"{path}: the self-energies of {', '.join(strange)} are not finite numbers; correct the table")
    return energies


@dataclass
class _Level:
    """Files that take one shift.

    Attributes
    ----------
    name : str or None
        The level of theory, where they state it.
    fitted : list of Path
        Those to which the shift is fitted.
    taken_for : list of Path
        Held-out ones, which take it as it is: a fit of their own would change what is tested.
    shift : LevelShift or None
        None until it is fitted.
    """

    name: str | None
    fitted: list[Path] = field(default_factory=list)
    taken_for: list[Path] = field(default_factory=list)
    shift: "LevelShift | None" = None

    def described(self) -> dict[str, Any]:
        """Plain data for the metadata."""
        assert self.shift is not None
        return {
            "source": ", ".join(path.name for path in self.fitted),
            "level_of_theory": self.name,
            "taken_for": [path.name for path in self.taken_for],
            "per_element_ev": {chemical_symbols[z]: e for z, e in self.shift.per_element.items()},
            "rms_per_atom_ev": {"before": self.shift.rms_before, "after": self.shift.rms_after},
        }


def _levels(trained: Iterable[Path], held_out: Iterable[Path], stated: Callable[[Path], str | None]) -> list[_Level]:
    """Levels of theory of the files, that of the first file first; training files that state none are each by themselves."""
    levels: list[_Level] = []
    by_name: dict[str, _Level] = {}
    for path in trained:
        name = stated(path)
        level = _Level(name) if name is None else by_name.setdefault(name, _Level(name))
        if not level.fitted:
            levels.append(level)
        level.fitted.append(path)
    for path in held_out:
        by_name.get(stated(path) or "", levels[0]).taken_for.append(path)
    return levels


def _moved_to_level(block: FrameBlock, own: "LevelShift", target: "LevelShift") -> FrameBlock:
    """The block with its total energies at the level of theory of `target`."""
    if own is target:
        return block
    new = [chemical_symbols[z] for z in sorted({int(z) for z in block.atomic_numbers} - own.per_element.keys())]
    if new:  # of files that are held out
        raise DataError(
            f"a file that is held out has {', '.join(new)}, which the training files of its level of theory lack: its energies cannot be aligned; "
            "leave these molecules out of it, or add such to the training files"
        )
    difference = sum(own.per_element.get(int(z), 0.0) - target.per_element.get(int(z), 0.0) for z in block.atomic_numbers)
    return replace(block, energies=block.energies - difference)


def prepare(
    inputs: list[Path],
    output: Path,
    layout: str = "auto",
    energy_key: str | None = None,
    force_key: str | None = None,
    energy_unit: str | None = None,
    force_unit: str | None = None,
    energies_only: bool = False,
    self_energies: str = "auto",
    validation: float | None = None,
    test: float = 0.0,
    seed: int = 0,
    split_by: str = "formula",
    align_to: "ModelReference | None" = None,
    level_of_theory: str | None = None,
    validation_data: Sequence[Path] = (),
    test_data: Sequence[Path] = (),
    hold_out_molecules: bool = False,
    progress: Callable[[str, int], None] | None = None,
) -> PackedDataset:
    """Pack data files for training.

    Parameters
    ----------
    inputs : list of Path
        HDF5 or extended XYZ files; all are packed together. A file that is named n times weighs n times as much.
    output : Path
        Directory to make.
    layout, energy_key, force_key, energy_unit, force_unit, energies_only
        See `open_blocks`. The ANI-1 layout implies energies alone; it is packed with others only if that is asked for.
    self_energies : str
        ``auto`` (isolated-atom frames if there are any, else least squares), ``least-squares``, ``isolated-atoms``, the path of
        a JSON table, or that of a packed data set, whose self-energies are taken: for data that a model trained on it is to go on with.
    validation, test : float
        Fractions of the formulas (or frames) of `inputs` that are held out; for validation 0.05 where `validation_data` names no files.
    seed : int
        Seed of the split.
    split_by : str
        ``formula``: no molecule is both trained on and tested. ``frame``: for data of a single molecule, frame by frame.
    align_to : ModelReference, optional
        A model whose energies tell how the levels of theory of the files differ. The energies of all are shifted, per element, to the level
        of the first, and the self-energies are those to which the model's energies are relative at that level: what a model that starts
        from it needs. `self_energies` must then be ``auto``. Files of `inputs` that state one level of theory share a shift, those that state
        none have each their own; files that are held out take that of their level, or that of the first file.
    level_of_theory : str, optional
        Origin of the labels, for those who use the model; by default what the files say.
    validation_data, test_data : sequence of Path
        Files whose frames choose a model, or test it, in place of a fraction: for data that come with a split.
    hold_out_molecules : bool
        Leave out frames that would be trained on, or choose a model, and have a molecule whose formula a later split holds, as one of several
        or alone: a pair has a formula of its own, so a split by formula holds pairs out, not their halves.
    progress : callable, optional
        Called with the file's name and the number of frames written so far.

    Returns
    -------
    PackedDataset
        The finished data set.

    Raises
    ------
    DataError
        For bad input of any kind; nothing is left behind.
    FileExistsError
        If `output` exists.
    """
    if not inputs:
        raise DataError("no input file given")
    held_out = {"validation": list(validation_data), "test": list(test_data)}
    if validation is None:
        validation = 0.0 if held_out["validation"] else VALIDATION
    for split, fraction in (("validation", validation), ("test", test)):
        if held_out[split] and fraction > 0:
            raise DataError(f"{split} frames come from files or are a fraction ({fraction:g}) of the others, not both; leave one of them out")
    if min(validation, test) < 0 or validation + test >= 1:
        raise DataError(f"validation ({validation}) and test ({test}) must be fractions that leave something to train on")
    if split_by not in ("formula", "frame"):
        raise DataError(f"split_by must be formula or frame, got {split_by!r}")
    if hold_out_molecules and split_by == "frame":
        raise DataError("hold_out_molecules is for data split by formula: frame by frame, molecules are both trained on and held out")
    files: list[tuple[Path, str | None]] = [(p, None) for p in inputs] + [(p, split) for split, paths in held_out.items() for p in paths]
    missing = [str(p) for p, _ in files if not p.is_file()]
    if missing:  # said before the others are read
        raise DataError(f"{', '.join(missing)}: no such file")
    kinds = {(detect_layout(p) if layout == "auto" else layout) for p, _ in files}
    if "ani1" in kinds and len(kinds) > 1 and not energies_only:
        without = ", ".join(str(p) for p, _ in files if detect_layout(p) == "ani1")
        raise DataError(
            f"{without} has no forces (ANI-1 layout), the other files do; leave it out to train on forces, or leave the forces of all out, with "
            "--energies-only"
        )
    with_forces = not energies_only and kinds != {"ani1"}
    if align_to is not None and self_energies != "auto":
        raise DataError(f"a model to align to brings its self-energies; self_energies must be auto, got {self_energies!r}")
    report = ReadReport()

    def blocks_of(path: Path, into: ReadReport) -> Iterator[FrameBlock]:
        return open_blocks(path, into, layout, energy_key, force_key, energy_unit, force_unit, not with_forces)

    def stated_level(path: Path) -> str | None:
        beginning = ReadReport()
        next(blocks_of(path, beginning), None)
        return beginning.level_of_theory

    levels: list[_Level] = []
    shifts: dict[Path, LevelShift] = {}
    if align_to is not None:
        levels = _levels(dict.fromkeys(inputs), dict.fromkeys(path for path, split in files if split is not None), stated_level)
        for level in levels:
            level.shift = align_to.shift(chain.from_iterable(blocks_of(path, ReadReport()) for path in level.fitted))
            shifts |= dict.fromkeys((*level.taken_for, *level.fitted), level.shift)
    writer = PackedWriter(output, with_forces)
    try:
        for path, split_of_file in files:
            for block in blocks_of(path, report):
                if shifts:
                    block = _moved_to_level(block, shifts[path], shifts[inputs[0]])
                writer.add(block, split_of_file)
                if progress is not None:
                    progress(path.name, writer.n_frames)
    except BaseException:
        writer.discard()
        raise
    table: dict[int, float] | None = None
    origin = "least squares"
    if align_to is not None:
        first = shifts[inputs[0]].per_element
        table, origin = {z: e + first.get(z, 0.0) for z, e in align_to.self_energies.items()}, f"those of {align_to.name}, aligned"
    elif self_energies == "isolated-atoms" or (self_energies == "auto" and report.isolated_atoms):
        table, origin = report.isolated_atoms, "isolated atoms"
        if not table:
            writer.discard()
            raise DataError("no isolated-atom frame in the input; add the file that holds them, or use least squares or a table")
        if report.contradictions:
            writer.discard()
            raise DataError(
                f"isolated atoms contradict each other: {report.contradictions[0]}; remove the wrong one, or choose other self-energies "
                "(--self-energies least-squares, or a table)"
            )
    elif self_energies not in ("auto", "least-squares"):
        try:
            table, origin = read_self_energy_table(Path(self_energies)), "table"
        except DataError:
            writer.discard()
            raise
    times = Counter(p.name if split is None else f"{p.name}, {split}" for p, split in files)
    extra = {"sources": [name if n == 1 else f"{name} ({n} times)" for name, n in times.items()], **report.as_dict()}
    extra["units_read"] = units_of(kinds, energy_unit, force_unit, with_forces)
    extra["split_files"] = {split: [p.name for p in paths] for split, paths in held_out.items()}
    if align_to is not None:
        extra["aligned_to"] = align_to.name
        extra["level_shifts"] = [level.described() for level in levels]
    if level_of_theory is not None:
        extra["level_of_theory"] = level_of_theory
    return writer.close(table, origin, {"validation": validation, "test": test}, seed, extra, split_by, hold_out_molecules)
