"""Reader of extended XYZ, in which most published benchmark sets come."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import iread

from training.data.frames import DataError, FrameBlock, ReadReport, charge_or_spin, hill_formula, keep_finite
from training.units import energy_factor, force_factor


def require_whole(path: Path, sizes: Sequence[int]) -> None:
    """Refuse an XYZ file of which ASE has read the beginning alone: to it an empty line between frames is the end.

    Parameters
    ----------
    path : Path
        The file.
    sizes : sequence of int
        Numbers of atoms of the frames that were read.

    Raises
    ------
    DataError
        With the number of the line that ASE stopped at.
    """
    with open(path) as file:
        lines = enumerate(file, start=1)
        for size in sizes:
            for _ in range(size + 2):
                next(lines, None)
        for number, line in lines:
            if line.strip() and not line.startswith("VEC"):  # cell vectors, in an older form of the format
                raise DataError(
                    f"{path}: after {len(sizes)} frames there is an empty line, and more from line {number} on; remove empty lines between frames"
                )


def _frames(path: Path) -> Iterator[Atoms]:
    """Frames of an extended XYZ file; a `DataError` with the number of the one that cannot be parsed, or has no atoms."""
    number = 0
    try:
        # ASE moves the standard names into a calculator; ask for plain access through both doors.
        for atoms in iread(path, index=":", format="extxyz", do_not_split_by_at_sign=True):
            if len(atoms) == 0:
                raise DataError(f"{path}: frame {number} has no atoms; remove it")
            yield atoms
            number += 1
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # ASE raises whatever the parser met
        raise DataError(f"{path}: cannot read frame {number} as extended XYZ ({error})") from error
    if number == 0:
        raise DataError(f"{path}: holds no frame")


def formulas_of_extxyz(path: Path) -> set[str]:
    """Formulas of the frames of more than one atom, whose labels are not looked at; errors as those of `read_extxyz` that do not speak of them."""
    formulas, sizes = set[str](), list[int]()
    for atoms in _frames(path):
        sizes.append(len(atoms))
        if len(atoms) > 1:  # not an isolated atom
            formulas.add(hill_formula(atoms.numbers))
    require_whole(path, sizes)
    return formulas


def read_extxyz(
    path: Path,
    report: ReadReport,
    energy_key: str = "energy",
    force_key: str | None = "forces",
    energy_unit: str = "eV",
    force_unit: str = "eV/Angstrom",
) -> Iterator[FrameBlock]:
    """Stream an extended XYZ file; frames of isolated atoms become self-energies.

    A frame of one atom is an isolated atom, whose forces a file need not give.

    Parameters
    ----------
    path, report
        As in `training.data.hdf5.read_ani1x`.
    energy_key, force_key : str
        Entry of ``info`` and column of ``arrays`` with the labels; `force_key` None for energies alone.
    energy_unit, force_unit : str
        Units of the labels.

    Yields
    ------
    FrameBlock
        One frame each.

    Raises
    ------
    DataError
        For a missing label, lines after the last frame, a periodic frame, one without atoms, an isolated atom whose energy is not finite, or a
        file that ASE cannot parse (with the number of the frame); at the end of a file, if it says that frames are charged or have unpaired
        electrons (with their number).
    """
    e_factor, f_factor = energy_factor(energy_unit), force_factor(force_unit)
    number, refused, sizes = -1, list[str](), list[int]()
    try:
        for number, atoms in enumerate(_frames(path)):
            sizes.append(len(atoms))
            results = atoms.calc.results if atoms.calc is not None else {}
            energy = atoms.info.get(energy_key, results.get(energy_key))
            if energy is None:
                held = sorted({*atoms.info, *results})
                raise DataError(f"{path}: frame {number} has no energy {energy_key!r}; it holds {', '.join(held) or 'none'}. Name the right key.")
            if atoms.pbc.any():
                raise DataError(f'{path}: frame {number} is periodic; training data must be molecules or clusters (pbc="F F F")')
            state = charge_or_spin(atoms.info, len(atoms))
            if state is not None:
                refused.append(f"frame {number} has {state}")
                continue
            if len(atoms) == 1:
                if not np.isfinite(float(energy)):
                    raise DataError(f"{path}: frame {number}, an isolated {atoms.symbols[0]}, has the energy {energy}; remove or correct it")
                report.isolated_atom(int(atoms.numbers[0]), float(energy) * e_factor, f"{path}, frame {number},")
                continue
            forces = None
            if force_key is not None:
                forces = atoms.arrays.get(force_key, results.get(force_key))
                if forces is None:
                    held = sorted({*atoms.arrays, *results})
                    raise DataError(
                        f"{path}: frame {number} has no forces {force_key!r}; it holds {', '.join(held)}. "
                        "Name the right key, or ask for energies alone."
                    )
                forces = (np.asarray(forces)[None] * f_factor).astype(np.float32)
            block = FrameBlock(
                formula=hill_formula(atoms.numbers),
                atomic_numbers=atoms.numbers.astype(np.uint8),
                coordinates=atoms.positions[None].astype(np.float32),
                energies=np.array([float(energy) * e_factor]),
                forces=forces,
            )
            kept = keep_finite(block, report)
            if kept is not None:
                yield kept
        require_whole(path, sizes)
    except DataError:
        raise
    except Exception as error:  # of labels that are no numbers, or of another shape
        raise DataError(f"{path}: cannot read frame {number} as extended XYZ ({error})") from error
    if refused:
        raise DataError(
            f"{path}: {len(refused)} of {number + 1} frames are charged or have unpaired electrons, the first: {refused[0]}; "
            "models know neither charge nor spin: remove these frames"
        )
