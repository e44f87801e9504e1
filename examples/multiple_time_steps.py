"""Multiple time steps: direct forces every 0.5 fs, corrected to the conservative ones every 2 fs; total energy and cost of both.

python examples/multiple_time_steps.py --femtoseconds 1000
"""

import argparse
import time
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit

from openmm_se3 import MultipleTimeStepIntegrator, SE3Potential
from openmm_se3.structures import read_structure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--femtoseconds", type=float, default=100)
parser.add_argument("--inner-steps", type=int, default=4, help="of 0.5 fs, to each correction; even")
parser.add_argument("--hydrogen-mass", type=float, help="dalton, such as 3, taken from the atoms that hydrogens are bonded to")
arguments = parser.parse_args()

topology, positions = read_structure(Path(__file__).parent / "ethanol.sdf")
outer = 0.5 * arguments.inner_steps
# Without friction: constant energy. With a thermostat: its temperature and friction.
runs = {
    "conservative": openmm.VerletIntegrator(0.5 * unit.femtosecond),
    "mts": MultipleTimeStepIntegrator(0, 0, outer * unit.femtosecond, arguments.inner_steps, fastInSlow=True),
}
for forces, integrator in runs.items():
    potential = SE3Potential("se3-ani1x", forces=forces, inner_steps=arguments.inner_steps)
    system = potential.createSystem(topology, removeCMMotion=False, hydrogenMass=arguments.hydrogen_mass)
    simulation = app.Simulation(topology, system, integrator, openmm.Platform.getPlatformByName("Reference"))
    simulation.context.setPositions(positions)
    simulation.step(3)  # TorchScript optimises the model during its first calls
    simulation.context.setPositions(positions)
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
    block = max(round(arguments.femtoseconds / 10 / outer), 1)
    steps = block if forces == "mts" else block * arguments.inner_steps
    energies, begin = [], time.perf_counter()
    for _ in range(10):
        simulation.step(steps)
        state = simulation.context.getState(getEnergy=True)
        energies.append((state.getPotentialEnergy() + state.getKineticEnergy()).value_in_unit(unit.kilojoule_per_mole))
    cost = (time.perf_counter() - begin) / (10 * block * outer)
    print(f"{forces:>12}: total energy {np.mean(energies):8.3f} kJ/mol, standard deviation {np.std(energies):.3f}, {1e3 * cost:.1f} ms/fs")
