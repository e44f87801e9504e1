"""Candidates away from where molecules rest: bonds stretched and pressed, torsions all the way round, angles far from equilibrium.

Dynamics at temperatures that molecules survive never meets these, and a model that has not seen them makes up barriers, holes and flat torsions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from scipy.spatial.transform import Rotation

from training.label.displacements import BONDED, displaced_frames
from training.label.structures import is_plausible

#: Range of a bond's length, in units of its own at rest.
STRETCHES = (0.75, 2.0)
#: A second bond is stretched together with the first in this share of the frames.
SECOND_BOND = 0.25
#: Largest change of an angle, degrees.
BEND = 40.0
_TRIES = 10


@dataclass(frozen=True)
class Hinge:
    """A bond that is in no ring: the molecule falls into two parts without it.

    Attributes
    ----------
    pivot, end : int
        Its two atoms.
    side : ndarray
        The smaller part, which holds `end`.
    """

    pivot: int
    end: int
    side: np.ndarray


def _neighbors(atoms: Atoms) -> list[list[int]]:
    radii = covalent_radii[atoms.numbers]
    distance = atoms.get_all_distances()
    np.fill_diagonal(distance, np.inf)
    return [np.flatnonzero(row).tolist() for row in distance < BONDED * (radii[:, None] + radii[None])]


def hinges(atoms: Atoms) -> list[Hinge]:
    """Bonds of a molecule that are in no ring."""
    neighbors = _neighbors(atoms)
    found = []
    for i, bonded in enumerate(neighbors):
        for j in bonded:
            if j < i:
                continue
            side = _part(neighbors, j, i)
            if i in side:
                continue
            if len(side) <= len(atoms) // 2:
                found.append(Hinge(i, j, np.array(sorted(side))))
            else:
                found.append(Hinge(j, i, np.array(sorted(_part(neighbors, i, j)))))
    return found


def _part(neighbors: list[list[int]], start: int, barred: int) -> set[int]:
    """Atoms that are reached from `start` without the bond to `barred`."""
    part, stack = {start}, [start]
    while stack:
        at = stack.pop()
        new = set(neighbors[at]) - part - ({barred} if at == start else set())
        part |= new
        stack += new
    return part


def stretched(positions: np.ndarray, bond: Hinge, factor: float) -> np.ndarray:
    """Positions with a bond `factor` times as long; its smaller side moves along, as it is."""
    x = positions.copy()
    x[bond.side] += (x[bond.end] - x[bond.pivot]) * (factor - 1.0)
    return x


def _stretch(atoms: Atoms, rng: np.random.Generator, bonds: list[Hinge], neighbors: list[list[int]]) -> np.ndarray:
    x = atoms.positions
    n = 2 if len(bonds) > 1 and rng.random() < SECOND_BOND else 1
    for k in rng.choice(len(bonds), size=n, replace=False):
        x = stretched(x, bonds[k], rng.uniform(*STRETCHES))
    return x


def _turn(atoms: Atoms, rng: np.random.Generator, bonds: list[Hinge], neighbors: list[list[int]]) -> np.ndarray:
    x = atoms.positions.copy()
    bond = bonds[rng.integers(len(bonds))]
    axis = x[bond.end] - x[bond.pivot]
    rotation = Rotation.from_rotvec(rng.uniform(0.0, 2.0 * np.pi) * axis / np.linalg.norm(axis))
    x[bond.side] = rotation.apply(x[bond.side] - x[bond.end]) + x[bond.end]
    return x


def _bend(atoms: Atoms, rng: np.random.Generator, bonds: list[Hinge], neighbors: list[list[int]]) -> np.ndarray:
    x = atoms.positions.copy()
    bond = bonds[rng.integers(len(bonds))]
    others = [k for k in neighbors[bond.pivot] if k != bond.end]
    arm = x[bond.end] - x[bond.pivot]
    axis = np.cross(arm, x[others[rng.integers(len(others))]] - x[bond.pivot])
    if np.linalg.norm(axis) < 1e-3 * np.linalg.norm(arm):  # straight: any axis across bends it
        axis = np.cross(arm, rng.standard_normal(3))
    rotation = Rotation.from_rotvec(np.radians(rng.uniform(-BEND, BEND)) * axis / np.linalg.norm(axis))
    x[bond.side] = rotation.apply(x[bond.side] - x[bond.pivot]) + x[bond.pivot]
    return x


def _frames(
    atoms: Atoms, temperature: float, n_frames: int, rng: np.random.Generator, change: Callable, eligible: Callable[[Hinge, list[list[int]]], bool]
) -> list[Atoms]:
    neighbors = _neighbors(atoms)
    bonds = [bond for bond in hinges(atoms) if eligible(bond, neighbors)]
    if not bonds:
        return []
    frames: list[Atoms] = []
    for _ in range(_TRIES * n_frames):
        if len(frames) == n_frames:
            break
        for shaken in displaced_frames(atoms, temperature, 1, rng):
            frame = Atoms(atoms.numbers, change(shaken, rng, bonds, neighbors))
            if is_plausible(frame):
                frames.append(frame)
    return frames


def stretched_frames(atoms: Atoms, temperature: float, n_frames: int, rng: np.random.Generator) -> list[Atoms]:
    """Frames with one bond, sometimes two, at a random length within `STRETCHES` of what it was; what hangs on it moves along.

    Parameters
    ----------
    atoms : ase.Atoms
        Geometry at rest.
    temperature : float
        K, of the displacements of `training.label.displacements` that all atoms get first.
    n_frames : int
        Frames wanted; fewer come back if most collide, none without a bond outside of rings.
    rng : numpy.random.Generator
        Of everything drawn.
    """
    return _frames(atoms, temperature, n_frames, rng, _stretch, lambda bond, neighbors: True)


def turned_frames(atoms: Atoms, temperature: float, n_frames: int, rng: np.random.Generator) -> list[Atoms]:
    """Frames with one torsion at a random angle, all directions alike; parameters and result as in `stretched_frames`.

    Bonds count that are in no ring and have further atoms on both sides, double bonds included.
    """

    def has_torsion(bond: Hinge, neighbors: list[list[int]]) -> bool:
        return len(neighbors[bond.pivot]) > 1 and len(neighbors[bond.end]) > 1

    return _frames(atoms, temperature, n_frames, rng, _turn, has_torsion)


def bent_frames(atoms: Atoms, temperature: float, n_frames: int, rng: np.random.Generator) -> list[Atoms]:
    """Frames with one angle changed by up to `BEND`, what hangs on its end turning along; parameters and result as in `stretched_frames`."""
    return _frames(atoms, temperature, n_frames, rng, _bend, lambda bond, neighbors: len(neighbors[bond.pivot]) > 1)
