"""Torsion profiles against DFT, both at the same geometries."""

import numpy as np

from openmm_se3.physics.reference import level_of_theory, reference_curve
from openmm_se3.physics.report import Line, Panel, Quantity, Section
from openmm_se3.physics.settings import PhysicsSettings
from openmm_se3.physics.subject import Subject, left_out

CURVES = ("ethanol H-O-C-C", "butane C-C-C-C")


def profile_errors(found: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Root-mean-square difference after the means are aligned, and difference of the highest point above the lowest."""
    difference = found - reference
    return float(np.std(difference)), float(np.ptp(found) - np.ptp(reference))


def measure_torsion(subject: Subject, settings: PhysicsSettings) -> Section:
    """Rigid scans about one bond, all else as in the G2 set."""
    quantities: list[Quantity] = []
    panels: list[Panel] = []
    curves = {name: reference_curve(name) for name in CURVES}
    for name, curve in curves.items():
        if not subject.knows(curve.symbols):
            continue
        found = np.array([subject.surface(curve.symbols).energy(x) for x in curve.positions_nm])
        rms, barrier = profile_errors(found, curve.energies)
        quantities += [
            Quantity(f"{name}: RMS error", rms, "kJ/mol"),
            Quantity(f"{name}: error of the height {np.ptp(curve.energies):.1f}", barrier, "kJ/mol"),
        ]
        lines = [
            Line("model", curve.values.tolist(), (found - found.min()).tolist()),
            Line(level_of_theory(), curve.values.tolist(), (curve.energies - curve.energies.min()).tolist(), points=True),
        ]
        panels.append(Panel(name, f"{curve.coordinate} ({curve.unit})", "energy (kJ/mol)", lines))
    notes = left_out(subject, {name: curve.symbols for name, curve in curves.items()})
    return Section("torsion", f"Rigid torsions against {level_of_theory()}", quantities, panels, notes)
