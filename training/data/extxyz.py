"""Reader of extended XYZ, in which most published benchmark sets come."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase.io import iread

from training.data.frames import DataError, FrameBlock, ReadReport, hill_formula, keep_finite
from training.units import energy_factor, force_factor


def read_extxyz(
    path: Path,
    report: ReadReport,
    energy_key: str = "energy",
    force_key: str | None = "forces",
    energy_unit: str = "eV",
    force_unit: str = "eV/Angstrom",
) -> Iterator[FrameBlock]:
    """Stream an extended XYZ file; frames of isolated atoms become self-energies.

    A frame is an isolated atom if it has one atom and its ``config_type`` says so (``IsolatedAtom``), or if it has one atom
    and the file is asked for forces, which a lone atom cannot teach.

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
        For a missing label, a periodic frame, or a file that ASE cannot parse (with the number of the frame).
    """
    e_factor, f_factor = energy_factor(energy_unit), force_factor(force_unit)
    number = -1
    try:
        # ASE moves the standard names into a calculator; ask for plain access through both doors.
        for number, atoms in enumerate(iread(path, index=":", format="extxyz")):
            results = atoms.calc.results if atoms.calc is not None else {}
            energy = atoms.info.get(energy_key, results.get(energy_key))
            if energy is None:
                held = sorted({*atoms.info, *results})
                raise DataError(f"{path}: frame {number} has no energy {energy_key!r}; it holds {', '.join(held) or 'none'}. Name the right key.")
            if len(atoms) == 1:
                report.isolated_atoms[int(atoms.numbers[0])] = float(energy) * e_factor
                continue
            if atoms.pbc.any():
                raise DataError(f'{path}: frame {number} is periodic; training data must be molecules or clusters (pbc="F F F")')
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
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # ASE raises whatever the parser met
        raise DataError(f"{path}: cannot read frame {number + 1} as extended XYZ ({error})") from error
    if number < 0:
        raise DataError(f"{path}: holds no frame")
