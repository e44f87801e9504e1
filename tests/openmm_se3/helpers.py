"""Structures and models for the tests of the runtime package; nothing here needs `training`."""

from pathlib import Path

import numpy as np
import openmm
import torch
from openmm import app, unit

from openmm_se3.structures import read_structure

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
MODEL = "se3-ani1x"


def ethanol() -> tuple[app.Topology, np.ndarray]:
    """Topology and distorted, asymmetric positions (nm) of ethanol."""
    topology, positions = read_structure(EXAMPLES / "ethanol.sdf")
    return topology, positions + np.random.default_rng(0).normal(scale=0.003, size=positions.shape)


def numbers(topology: app.Topology) -> torch.Tensor:
    """Atomic numbers of all atoms."""
    return torch.tensor([a.element.atomic_number for a in topology.atoms()])


def energy_and_forces(system: openmm.System, positions: np.ndarray, platform: str = "Reference") -> tuple[float, np.ndarray]:
    """Energy (kJ/mol) and forces (kJ/mol/nm) of a System."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(platform))
    context.setPositions(positions)
    state = context.getState(getEnergy=True, getForces=True)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    return state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole), np.array(forces)
