"""Continuity of energy and forces as a neighbour crosses the cutoff."""

from collections.abc import Callable

import numpy as np
from ase import Atoms

from openmm_se3.physics.molecules import starting_structure
from openmm_se3.physics.report import Line, Panel, Quantity, Section
from openmm_se3.physics.settings import PhysicsSettings
from openmm_se3.physics.subject import NO_DIRECT, Subject, left_out
from openmm_se3.physics.units import ANGSTROM_PER_NM

#: Distance of the nearest points to the crossing. Cubic extrapolation from four points on each side leaves an error of the fourth
#: power of it, and second-order envelopes have a third derivative that jumps.
STEP_NM = 1e-4
#: Jumps of a smooth model are rounding; those of a truncated one are whole kJ/mol/nm.
ENERGY_LIMIT, FORCE_LIMIT, STIFFNESS_LIMIT = 1e-6, 1e-4, 1e-1


def jump(function: Callable[[float], np.ndarray], step: float = STEP_NM) -> float:
    """Largest jump of a vector-valued function at 0, by cubic extrapolation from both sides.

    Parameters
    ----------
    function : callable
        Distance beyond the crossing to values.
    step : float
        Spacing of the four points on each side.

    Returns
    -------
    float
        ``max |f(0+) - f(0-)|``.
    """
    weights = (4.0, -6.0, 4.0, -1.0)
    sides = [sum(w * function(sign * (k + 1) * step) for k, w in enumerate(weights)) for sign in (1.0, -1.0)]
    return float(np.max(np.abs(sides[0] - sides[1])))


def derivative(function: Callable[[float], np.ndarray]) -> Callable[[float], np.ndarray]:
    """Central difference whose points stay on their side of the crossing, one `STEP_NM` away from it or more."""
    return lambda s: (function(s + STEP_NM / 4) - function(s - STEP_NM / 4)) / (STEP_NM / 2)


def along(function: Callable[[np.ndarray], np.ndarray | float], place: Callable[[float], np.ndarray]) -> Callable[[float], np.ndarray]:
    """A function of positions as one of the distance beyond the crossing."""
    return lambda s: np.asarray(function(place(s)))


def two_bodies(first: Atoms, second: Atoms, cutoff_nm: float) -> tuple[Callable[[float], np.ndarray], np.ndarray]:
    """Two bodies, their first atoms a cutoff plus the argument apart along an axis without symmetry.

    Returns
    -------
    tuple
        Function of the distance beyond the cutoff (nm) to positions ``(n_atoms, 3)`` nm, and the axis.
    """
    axis = np.array([0.62, 0.48, 0.62])
    axis /= np.linalg.norm(axis)
    turned = second.copy()
    turned.rotate(67.0, (1.0, 2.0, 3.0))
    a = (first.positions - first.positions[0]) / ANGSTROM_PER_NM
    b = (turned.positions - turned.positions[0]) / ANGSTROM_PER_NM
    return lambda beyond: np.concatenate([a, b + (cutoff_nm + beyond) * axis]), axis


def measure_continuity(subject: Subject, settings: PhysicsSettings) -> Section:
    """Two waters, whose O-O distance crosses the cutoff, and two lone atoms, for which the one neighbour there is disappears."""
    cutoff = subject.metadata.cutoff_nm
    first, last = subject.metadata.elements[0], subject.metadata.elements[-1]
    cases = {f"{last} and {first}": (Atoms(last, positions=[(0, 0, 0)]), Atoms(first, positions=[(0, 0, 0)]))}
    if subject.knows(["H", "O"]):
        cases["water dimer"] = (starting_structure("water"), starting_structure("water"))
    trained = "direct" not in subject.metadata.untrained
    notes = left_out(subject, {"water dimer": ["H", "O"]}) + ([] if trained else [NO_DIRECT])
    quantities: list[Quantity] = []
    panels: list[Panel] = []
    for name, (one, other) in cases.items():
        place, axis = two_bodies(one, other, cutoff)
        surface = subject.surface((one + other).get_chemical_symbols())
        quantities.append(Quantity(f"{name}: jump of the energy", jump(along(surface.energy, place)), "kJ/mol", must=ENERGY_LIMIT))
        s = np.linspace(-0.03, 0.03, settings.points)
        energies = np.array([surface.energy(place(v)) for v in s])
        label = "distance beyond the cutoff (nm)"
        panels.append(Panel(name, label, "energy (kJ/mol)", [Line("energy", s.tolist(), (energies - energies[-1]).tolist())]))
        forces = Panel(name, label, "force on the far body,\nalong the axis (kJ/mol/nm)", [])
        kinds = {"conservative": surface.conservative} | ({"direct": surface.direct} if trained else {})
        for kind, function in kinds.items():
            force = along(function, place)
            quantities += [
                Quantity(f"{name}: jump of the {kind} force", jump(force), "kJ/mol/nm", must=FORCE_LIMIT),
                Quantity(f"{name}: jump of the {kind} stiffness", jump(derivative(force)), "kJ/mol/nm^2", must=STIFFNESS_LIMIT),
            ]
            forces.lines.append(Line(kind, s.tolist(), [float(np.sum(force(v)[len(one) :] @ axis)) for v in s]))
        panels.append(forces)
    return Section("continuity", f"Continuity as a neighbour crosses the cutoff of {cutoff:g} nm", quantities, panels, notes)
