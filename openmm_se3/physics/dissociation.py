"""Dissociation curves and the repulsive wall: no way down into contact, no minimum that chemistry does not know."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import combinations_with_replacement

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, covalent_radii

from openmm_se3.physics.molecules import starting_structure
from openmm_se3.physics.reference import ReferenceCurve, level_of_theory, reference_curve
from openmm_se3.physics.report import Line, Panel, Quantity, Section
from openmm_se3.physics.settings import PhysicsSettings
from openmm_se3.physics.subject import Subject, left_out
from openmm_se3.physics.units import ANGSTROM_PER_NM, BOLTZMANN

#: A bare pair of atoms is on its wall below this share of the sum of their covalent radii.
WALL_SHARE = 0.75


@dataclass(frozen=True)
class Shape:
    """What is wrong with a curve, kJ/mol; zeros for a sound one, NaN throughout for one with an energy that is NaN.

    Attributes
    ----------
    well : float
        Distance of the well.
    wall_drop : float
        Largest fall of the energy on the way from the well into contact.
    wall_top, wall_top_height : float
        Distance and energy above the well from which it falls first; NaN and infinity where it never does. Thermal atoms that
        reach this height fall together.
    hole : float
        Depth of the lowest point of the curve below the well.
    outer_drop : float
        Largest fall on the way from the well outwards, beyond which two fragments repel each other.
    """

    well: float
    wall_drop: float
    wall_top: float
    wall_top_height: float
    hole: float
    outer_drop: float


def _largest_drop(energies: np.ndarray) -> float:
    return float(np.max(np.maximum.accumulate(energies) - energies))


def curve_shape(distances: np.ndarray, energies: np.ndarray, expected_well: float) -> Shape:
    """Judge a curve.

    Parameters
    ----------
    distances : ndarray
        ``(n,)`` ascending.
    energies : ndarray
        ``(n,)`` kJ/mol.
    expected_well : float
        Where to look for the well: from there downhill.
    """
    if np.isnan(energies).any():
        return Shape(*[float("nan")] * len(fields(Shape)))
    i = int(np.argmin(np.abs(distances - expected_well)))
    while True:
        lower = min((k for k in (i - 1, i + 1) if 0 <= k < len(energies)), key=lambda k: energies[k])
        if energies[lower] >= energies[i]:
            break
        i = lower
    inwards = energies[i::-1]
    falls = np.flatnonzero(np.diff(inwards) < 0)
    top = i - int(falls[0]) if len(falls) else None
    return Shape(
        well=float(distances[i]),
        wall_drop=_largest_drop(inwards),
        wall_top=float("nan") if top is None else float(distances[top]),
        wall_top_height=float("inf") if top is None else float(energies[top] - energies[i]),
        hole=float(energies[i] - energies.min()),
        outer_drop=_largest_drop(energies[i:]),
    )


def pull(positions: np.ndarray, fixed: int, moved: int, group: list[int]) -> Callable[[float], np.ndarray]:
    """Positions as a function of the distance between atoms `fixed` and `moved`, along their line; all of `group` moves along."""
    axis = positions[moved] - positions[fixed]
    start = float(np.linalg.norm(axis))

    def place(distance: float) -> np.ndarray:
        x = positions.copy()
        x[group] += axis / start * (distance - start)
        return x

    return place


@dataclass(frozen=True)
class _Path:
    name: str
    symbols: list[str]
    place: Callable[[float], np.ndarray]
    nearest: float
    farthest: float
    well: float
    reference: ReferenceCurve | None = None


#: Paths, and the elements that a model must know for each.
PATHS = {
    "water O-H": ("H", "O"),
    "water dimer O-O": ("H", "O"),
    "ethanol C-C": ("H", "C", "O"),
    "methane dimer C-C": ("H", "C"),
}


def _paths(subject: Subject) -> list[_Path]:
    """All paths the model has the elements for; distances in nm."""
    paths = []
    if subject.knows(["H", "O"]):
        stretch, dimer = reference_curve("water O-H"), reference_curve("water dimer O-O")
        k = int(np.argmin(stretch.energies))
        place = pull(stretch.positions_nm[k], 0, 1, [1])
        paths.append(_Path("water O-H", stretch.symbols, place, 0.03, 0.6, stretch.values[k] / ANGSTROM_PER_NM, stretch))
        k = int(np.argmin(dimer.energies))
        place = pull(dimer.positions_nm[k], 0, 3, [3, 4, 5])
        paths.append(_Path("water dimer O-O", dimer.symbols, place, 0.12, 0.8, dimer.values[k] / ANGSTROM_PER_NM, dimer))
    if subject.knows(["H", "C", "O"]):
        # C C O H(O) H H H H H: the methyl group is the first carbon and the last three hydrogens.
        ethanol = starting_structure("ethanol")
        place = pull(ethanol.positions / ANGSTROM_PER_NM, 1, 0, [0, 6, 7, 8])
        paths.append(_Path("ethanol C-C", ethanol.get_chemical_symbols(), place, 0.05, 0.7, ethanol.get_distance(0, 1) / ANGSTROM_PER_NM))
    if subject.knows(["H", "C"]):
        one = starting_structure("methane")
        other = one.copy()
        other.rotate(180, "z")
        other.translate((3.8, 0, 0))
        pair: Atoms = one + other
        place = pull(pair.positions / ANGSTROM_PER_NM, 0, 5, list(range(5, 10)))
        paths.append(_Path("methane dimer C-C", pair.get_chemical_symbols(), place, 0.12, 0.8, 0.38))
    return paths


def bare_pairs(subject: Subject, settings: PhysicsSettings) -> tuple[list[Quantity], Panel]:
    """Walls of two lone atoms of every pair of elements: no such molecule was ever seen in training, yet atoms must not fuse."""
    quantities: list[Quantity] = []
    lines, drops, holes = [], {}, {}
    for a, b in combinations_with_replacement(subject.metadata.elements, 2):
        contact = (covalent_radii[atomic_numbers[a]] + covalent_radii[atomic_numbers[b]]) / ANGSTROM_PER_NM
        surface = subject.surface([a, b])
        wall = np.linspace(0.25 * contact, WALL_SHARE * contact, settings.points // 2, endpoint=False)
        r = np.concatenate([wall, np.linspace(WALL_SHARE * contact, subject.metadata.cutoff_nm, settings.points - len(wall))])
        energies = np.array([surface.energy(np.array([[0.0, 0, 0], [d, 0, 0]])) for d in r])
        inside = np.arange(len(r)) < len(wall)
        drops[f"{a}-{b}"] = _largest_drop(energies[inside][::-1])
        holes[f"{a}-{b}"] = float(np.maximum(0.0, energies[~inside].min() - energies[inside].min()))
        lines.append(Line(f"{a}-{b}", (r * ANGSTROM_PER_NM).tolist(), energies.tolist()))
    for what, values in (("fall inwards by", drops), ("hole on the wall", holes)):
        worst = max(values, key=lambda k: (np.isnan(values[k]), values[k]))
        named = f" ({worst})" if values[worst] != 0 else ""
        quantities.append(Quantity(f"bare pairs: {what}{named}", values[worst], "kJ/mol", must=0.0))
    return quantities, Panel("bare pairs of atoms", "distance (Angstrom)", "energy (kJ/mol)", lines, (-500.0, 3000.0))


def measure_dissociation(subject: Subject, settings: PhysicsSettings) -> Section:
    """Rigid curves of bonds and dimers, and of every bare pair of elements.

    The wall must rise all the way; elsewhere a false well or barrier must stay below the thermal energy kT.
    """
    thermal = round(BOLTZMANN * settings.temperature, 2)
    quantities: list[Quantity] = []
    panels: list[Panel] = []
    notes = left_out(subject, PATHS)
    for path in _paths(subject):
        surface = subject.surface(path.symbols)
        r = np.linspace(path.nearest, path.farthest, settings.points)
        energies = np.array([surface.energy(path.place(d)) for d in r])
        shape = curve_shape(r, energies, path.well)
        quantities += [
            Quantity(f"{path.name}: well at", shape.well * ANGSTROM_PER_NM, "Å"),
            Quantity(f"{path.name}: falls inwards by", shape.wall_drop, "kJ/mol", must=0.0),
            Quantity(f"{path.name}: hole below the well", shape.hole, "kJ/mol", must=thermal),
            Quantity(f"{path.name}: falls outwards by", shape.outer_drop, "kJ/mol", must=thermal),
        ]
        if shape.wall_drop > 0:
            top = f"{shape.wall_top_height:.0f} kJ/mol above the well, at {shape.wall_top * ANGSTROM_PER_NM:.2f} Å"
            notes.append(f"{path.name}: falls inwards from {top}")
        bottom = float(energies[np.argmin(np.abs(r - shape.well))])
        lines = [Line("model", (r * ANGSTROM_PER_NM).tolist(), (energies - bottom).tolist())]
        reach = max(10.0, float(energies[r > shape.well].max(initial=bottom) - bottom))  # 10 where that is NaN
        if path.reference is not None:
            ref = path.reference
            lines.append(Line(level_of_theory(), ref.values.tolist(), (ref.energies - ref.energies.min()).tolist(), points=True))
            at = np.array([surface.energy(x) for x in ref.positions_nm])
            last = at[-1] - at[np.argmin(ref.energies)] - np.ptp(ref.energies[np.argmin(ref.energies) :])
            quantities.append(Quantity(f"{path.name}: error of the rise to {ref.values[-1]:g} Å", float(last), "kJ/mol"))
            reach = max(reach, float(np.ptp(ref.energies[np.argmin(ref.energies) :])))
        panels.append(Panel(path.name, "distance (Angstrom)", "energy (kJ/mol)", lines, (-0.5 * reach, 1.5 * reach)))
    bare, panel = bare_pairs(subject, settings)
    quantities += bare
    panels.append(panel)
    return Section("dissociation", "Dissociation curves and repulsive wall", quantities, panels, notes)
