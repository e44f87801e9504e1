"""Several copies of ethanol in one force: they do not see each other, and eight cost less than eight times one.

    python examples/replicas.py --copies 8 --steps 500

Prints what each copy's forces differ from those of a molecule alone, and steps per second of all copies, in one force and one after the other.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import openmm
from openmm import unit

from openmm_se3 import SE3Potential, replicate
from openmm_se3.structures import read_structure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--copies", type=int, default=8)
parser.add_argument("--steps", type=int, default=100, help="of 0.5 fs, timed")
parser.add_argument("--blocks", type=int, default=5, help="the two ways take turns in so many portions; the fastest of each counts")
arguments = parser.parse_args()

topology, positions = read_structure(Path(__file__).parent / "ethanol.sdf")
many, many_positions, batch = replicate(topology, positions, arguments.copies)
potential = SE3Potential("se3-ani1x")
contexts = {}
for name, system, start in (
    ("together", potential.createSystem(many, batch=batch), many_positions),
    ("alone", potential.createSystem(topology), positions),
):
    integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 10 / unit.picosecond, 0.5 * unit.femtosecond)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(start)
    contexts[name] = context

forces = {name: context.getState(getForces=True).getForces(asNumpy=True)._value for name, context in contexts.items()}
difference = np.abs(forces["together"] - np.tile(forces["alone"], (arguments.copies, 1))).max()
print(f"largest difference of a force component: {difference:.1e} kJ/mol/nm")

steps = max(arguments.steps // arguments.blocks, 1)
fastest = dict.fromkeys(contexts, np.inf)
for context in contexts.values():
    context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
    context.getIntegrator().step(5)  # TorchScript optimises the model during its first calls
for _ in range(arguments.blocks):
    for name, context in contexts.items():
        begin = time.perf_counter()
        context.getIntegrator().step(steps)
        fastest[name] = min(fastest[name], (time.perf_counter() - begin) / steps)
together, separate = 1 / fastest["together"], 1 / (fastest["alone"] * arguments.copies)
print(
    f"{arguments.copies} copies: {together:.1f} steps/s in one force, {separate:.1f} steps/s one after the other; "
    f"{together / separate:.2f} times as fast, {together * arguments.copies:.0f} molecule steps/s"
)
