"""SE(3)-Transformer potentials for OpenMM.

The public names are those of `__all__`; see their docstrings. They are imported on first use, so that ``import openmm_se3`` costs
nothing and never fails for want of torch.

How the modules hang together, each using those below it:

    potential     SE3Potential: from topology and System to forces in it
    force         makes them: TorchForce, or python_force where that cannot be used
    binding       what a force computes: the model bound to its atoms, in the terms of a force mode
    model_file    opens an exported model and checks it

`checks` refuses unusable input for all of them. On these stand `structures` (files to topology and positions), `guard` and `committee` (reporters),
`replicas`, `masses`, `molecules` and `integrators` (what a simulation needs besides), `simulate` with `simulation_files` and `simulation_settings`
(whole runs), `calculator` (ASE), `openmmml_plugin` (openmm-ml), `validation` and `physics` (checks and measures of a model), `doctor` and `cli`.
"""

from typing import Any

__version__ = "0.1.0"

__all__ = [
    "CommitteeReporter",
    "DomainGuard",
    "MultipleTimeStepIntegrator",
    "SE3Calculator",
    "SE3Potential",
    "__version__",
    "available_models",
    "keep_molecules_whole",
    "load_model",
    "make_whole",
    "mend_serialisation",
    "replicate",
]

_HOMES = {
    "CommitteeReporter": "openmm_se3.committee",
    "DomainGuard": "openmm_se3.guard",
    "MultipleTimeStepIntegrator": "openmm_se3.integrators",
    "SE3Calculator": "openmm_se3.calculator",
    "SE3Potential": "openmm_se3.potential",
    "available_models": "openmm_se3.model_file",
    "keep_molecules_whole": "openmm_se3.molecules",
    "load_model": "openmm_se3.model_file",
    "make_whole": "openmm_se3.molecules",
    "mend_serialisation": "openmm_se3.serialisation",
    "replicate": "openmm_se3.replicas",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
