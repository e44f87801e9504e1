"""Minima and harmonic frequencies of small molecules against DFT."""

import numpy as np
from ase import Atoms
from ase.neighborlist import natural_cutoffs, neighbor_list

from openmm_se3.physics.reference import level_of_theory, reference_molecules
from openmm_se3.physics.report import Line, Panel, Quantity, Section
from openmm_se3.physics.settings import PhysicsSettings
from openmm_se3.physics.subject import NotConvergedError, Subject, left_out


def bonds_and_angles(atoms: Atoms) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
    """Bonded pairs, and triples i-j-k about each j, of a molecule, from its distances."""
    neighbors: dict[int, list[int]] = {i: [] for i in range(len(atoms))}
    for i, j in zip(*neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.15)), strict=True):
        neighbors[int(i)].append(int(j))
    bonds = [(i, j) for i, near in neighbors.items() for j in near if i < j]
    return bonds, [(i, j, k) for j, near in neighbors.items() for i in near for k in near if i < k]


def geometry_errors(found: Atoms, reference: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Differences of all bond lengths (Angstrom) and angles (degrees) of two geometries with the same order of atoms."""
    bonds, angles = bonds_and_angles(reference)
    lengths = [found.get_distance(i, j) - reference.get_distance(i, j) for i, j in bonds]
    degrees = [found.get_angle(i, j, k) - reference.get_angle(i, j, k) for i, j, k in angles]
    return np.array(lengths), np.array(degrees)


def measure_vibrations(subject: Subject, settings: PhysicsSettings) -> Section:
    """Errors of bonds, angles and frequencies, mode by mode in ascending order; water's bend and stretches singly."""
    quantities: list[Quantity] = []
    molecules = reference_molecules()
    notes = left_out(subject, {name: reference.atoms.get_chemical_symbols() for name, reference in molecules.items()})
    reference_all: list[float] = []
    found_all: list[float] = []
    for name, reference in molecules.items():
        if not subject.knows(reference.atoms.get_chemical_symbols()):
            continue
        try:
            at = subject.minimum(name, reference.atoms)
        except NotConvergedError as error:
            notes.append(str(error))
            continue
        lengths, angles = geometry_errors(at.atoms, reference.atoms)
        percent = 100 * (at.wavenumbers / reference.wavenumbers - 1)
        quantities += [
            Quantity(f"{name}: worst bond", float(np.abs(lengths).max()), "Å"),
            Quantity(f"{name}: worst angle", float(np.abs(angles).max()), "°"),
        ]
        if name == "water":
            modes = ("bend", "symmetric stretch", "antisymmetric stretch")
            quantities += [
                Quantity(f"water: {mode}, {reference.wavenumbers[i]:.0f} 1/cm", percent[i], "%", must=3.0, aim=1.0) for i, mode in enumerate(modes)
            ]
        else:
            quantities.append(Quantity(f"{name}: frequencies, mean |error|", float(np.abs(percent).mean()), "%"))
        if (at.wavenumbers < 0).any():
            notes.append(f"{name}: {int((at.wavenumbers < 0).sum())} imaginary frequencies; the minimum is a saddle")
        reference_all += reference.wavenumbers.tolist()
        found_all += at.wavenumbers.tolist()
    panels = []
    if found_all:
        ends = [0.0, max(reference_all)]
        lines = [Line("equal", ends, ends), Line("mode", reference_all, found_all, points=True)]
        panels.append(Panel("", f"{level_of_theory()} (1/cm)", "model (1/cm)", lines))
    return Section("vibrations", f"Geometry and harmonic frequencies against {level_of_theory()}", quantities, panels, notes)
