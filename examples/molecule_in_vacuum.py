"""Ethanol in vacuum: minimise, then Langevin dynamics at 300 K, with a trajectory and a log.

python examples/molecule_in_vacuum.py --steps 20000 --output ethanol-vacuum
"""

import argparse
from pathlib import Path

import openmm
from openmm import app, unit

from openmm_se3 import DomainGuard, SE3Potential
from openmm_se3.structures import read_structure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=2000, help="steps of 0.5 fs")
parser.add_argument("--output", type=Path, default=Path("ethanol-vacuum"))
arguments = parser.parse_args()
arguments.output.mkdir(parents=True, exist_ok=True)

topology, positions = read_structure(Path(__file__).parent / "ethanol.sdf")
# Conservative forces, since OpenMM's minimiser compares energies along its way.
system = SE3Potential("se3-ani1x", forces="conservative").createSystem(topology)
integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond)
# On a CPU the Reference platform has the least overhead for a model alone; on a GPU leave the platform to OpenMM.
simulation = app.Simulation(topology, system, integrator, openmm.Platform.getPlatformByName("Reference"))
simulation.context.setPositions(positions)
simulation.minimizeEnergy()
simulation.context.setVelocitiesToTemperature(300 * unit.kelvin)
every = max(arguments.steps // 20, 1)
simulation.reporters += [
    app.DCDReporter(str(arguments.output / "trajectory.dcd"), every),
    app.StateDataReporter(str(arguments.output / "log.csv"), every, step=True, potentialEnergy=True, totalEnergy=True, temperature=True),
    DomainGuard(topology, every),
]
simulation.step(arguments.steps)
energy = simulation.context.getState(getEnergy=True).getPotentialEnergy()
print(f"{arguments.steps} steps, potential energy {energy}, files in {arguments.output}")
