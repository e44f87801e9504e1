"""What a V2000 record of an SDF or MOL file states besides elements and coordinates: charges, radicals, bonds."""

import re

#: Charges in the lines of the atoms, as older files have them.
_CHARGE_OF_CODE = {1: 3, 2: 2, 3: 1, 5: -1, 6: -2, 7: -3}


def _first_record(text: str) -> str:
    return text.partition("M  END")[0]


def _properties(text: str) -> list[tuple[str, list[int]]]:
    """Kind and values of the lines ``M  CHG`` and ``M  RAD``, which give their number, then atoms and values."""
    lines = re.findall(r"(?m)^M  (CHG|RAD)(.*)", _first_record(text))
    return [(kind, [int(value) for value in line.split()[2::2]]) for kind, line in lines]


def formal_charge(text: str) -> int:
    """Sum of the charges that the first record states: in lines ``M  CHG``, or, without these and ``M  RAD``, as codes in the lines of the atoms."""
    properties = _properties(text)
    if properties:
        return sum(sum(values) for kind, values in properties if kind == "CHG")
    lines = _first_record(text).splitlines()
    atoms = lines[4 : 4 + int(lines[3][:3])]
    return sum(_CHARGE_OF_CODE.get(int(line[36:39].strip() or 0), 0) for line in atoms)


def multiplicity(text: str) -> int:
    """Largest multiplicity that a line ``M  RAD`` of the first record gives an atom; 1 without any."""
    return max((value for kind, values in _properties(text) if kind == "RAD" for value in values), default=1)


def bonds(text: str) -> list[tuple[int, int]]:
    """Pairs of atoms that the first record bonds, counted from 0."""
    lines = _first_record(text).splitlines()
    n_atoms, n_bonds = int(lines[3][:3]), int(lines[3][3:6])
    return [(int(line[:3]) - 1, int(line[3:6]) - 1) for line in lines[4 + n_atoms : 4 + n_atoms + n_bonds]]
