"""A copy of an HDF5 file of training data without some molecules: labels known to be wrong, such as those of a surrogate where it fails.

    python -m benchmarks.accuracy.without train.h5 train-without.h5 H2O CHN

The formulas are compared by their elements and numbers, so that H2O is also the group H2O1.
"""

import argparse
from pathlib import Path

import h5py
from ase.formula import Formula


def without(source: Path, target: Path, formulas: list[str]) -> dict[str, int]:
    """Copy all groups of `source` but those of `formulas`; gives the conformations left out, by group.

    Raises
    ------
    FileExistsError
        If `target` is there.
    ValueError
        If a formula is in no group: a slip of the pen would go unnoticed.
    """
    wanted = {name: Formula(name).count() for name in formulas}
    left_out: dict[str, int] = {}
    with h5py.File(source) as file:
        counts = {group: Formula(group).count() for group in file}
        missing = [name for name, count in wanted.items() if count not in counts.values()]
        if missing:
            raise ValueError(f"{source} has no conformations of {', '.join(missing)}")
        if target.exists():
            raise FileExistsError(f"{target} exists already; choose another name")
        with h5py.File(target, "w") as copy:
            copy.attrs.update(file.attrs)
            for group, count in counts.items():
                if count in wanted.values():
                    left_out[group] = len(file[group]["coordinates"])
                else:
                    file.copy(file[group], copy)
    return left_out


def main(argv: list[str] | None = None) -> None:
    """Copy and print what was left out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("formulas", nargs="+")
    arguments = parser.parse_args(argv)
    for group, n in without(arguments.source, arguments.target, arguments.formulas).items():
        print(f"left out {n} conformations of {group}")


if __name__ == "__main__":
    main()
