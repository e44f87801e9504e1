"""Structures and models for the tests of the runtime package; nothing here needs `training`."""

from functools import cache
from pathlib import Path

import numpy as np
import openmm
import torch
from openmm import app, unit

from openmm_se3 import SE3Potential
from openmm_se3.structures import read_structure

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
MODEL = "se3-ani1x"


def ethanol() -> tuple[app.Topology, np.ndarray]:
    """Topology and distorted, asymmetric positions (nm) of ethanol."""
    topology, positions = read_structure(EXAMPLES / "ethanol.sdf")
    return topology, positions + np.random.default_rng(0).normal(scale=0.003, size=positions.shape)


@cache
def potential(forces: str, precision: str = "double") -> SE3Potential:
    """The released model, opened once; Systems get copies of it."""
    return SE3Potential(MODEL, forces=forces, precision=precision)


def numbers(topology: app.Topology) -> torch.Tensor:
    """Atomic numbers of all atoms."""
    return torch.tensor([a.element.atomic_number for a in topology.atoms()])


def energy_and_forces(system: openmm.System, positions: np.ndarray, platform: str = "Reference", groups: int | set = -1) -> tuple[float, np.ndarray]:
    """Energy (kJ/mol) and forces (kJ/mol/nm) of a System, of all its force groups or of some."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(platform))
    context.setPositions(positions)
    state = context.getState(getEnergy=True, getForces=True, groups=groups)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    return state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole), np.array(forces)


def ethanol_in_classical_water() -> tuple[app.Topology, openmm.System, np.ndarray]:
    """Ethanol with a water 1.5 nm away and a classical System of both: topology, System, positions (nm)."""
    topology, positions = ethanol()
    modeller = app.Modeller(topology, positions * unit.nanometer)
    water = app.Topology()
    residue = water.addResidue("HOH", water.addChain())
    for name in ("O", "H", "H"):
        water.addAtom(name, app.Element.getBySymbol(name), residue)
    where = np.array([[0, 0, 0], [0.0957, 0, 0], [-0.024, 0.0927, 0]]) + np.array([2.0, 0, 0])
    modeller.add(water, where * unit.nanometer)
    classical, nonbonded, bonds = openmm.System(), openmm.NonbondedForce(), openmm.HarmonicBondForce()
    for atom in modeller.topology.atoms():
        classical.addParticle(atom.element.mass)
        nonbonded.addParticle(0.1, 0.3, 0.4)
    bonds.addBond(9, 10, 0.0957, 4e5)
    bonds.addBond(0, 1, 0.15, 3e5)
    for i in range(9):
        for j in range(i):
            nonbonded.addException(i, j, 0.005, 0.3, 0.0)
    for i, j in ((9, 10), (9, 11), (10, 11)):
        nonbonded.addException(i, j, 0.0, 0.3, 0.0)
    classical.addForce(nonbonded)
    classical.addForce(bonds)
    return modeller.topology, classical, np.array(modeller.positions.value_in_unit(unit.nanometer))
