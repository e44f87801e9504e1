"""Physics of a model, measured: what `openmm-se3 validate MODEL --physics` reports.

Each measure is a file: a function that computes a quantity of plain arrays and callables, and a function ``measure_...`` that applies it to
a model and returns a `Section`. `validate_physics` runs them all.
"""

from typing import Any

__all__ = ["FULL", "QUICK", "PhysicsSettings", "Quantity", "Section", "validate_physics"]

_HOMES = {
    "FULL": "openmm_se3.physics.settings",
    "QUICK": "openmm_se3.physics.settings",
    "PhysicsSettings": "openmm_se3.physics.settings",
    "Quantity": "openmm_se3.physics.report",
    "Section": "openmm_se3.physics.report",
    "validate_physics": "openmm_se3.physics.validate",
}


def __getattr__(name: str) -> Any:
    # On first use, so that the harmonic analysis, for example, is of use where there is no torch.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
