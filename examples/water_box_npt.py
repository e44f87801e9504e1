"""64 waters at constant pressure, molecules kept whole by the barostat.

python examples/water_box_npt.py --steps 20000
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit

from openmm_se3 import MultipleTimeStepIntegrator, SE3Potential, keep_molecules_whole
from openmm_se3.structures import read_structure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=2000, help="outer steps, of 2 fs")
arguments = parser.parse_args()

# Waters in random orientations on a lattice with the density of the liquid.
water, atoms = read_structure(Path(__file__).parent / "water.xyz")
spacing, n = 0.3107, 4
random = np.random.default_rng(1)
modeller = app.Modeller(app.Topology(), [] * unit.nanometer)
for cell in itertools.product(range(n), repeat=3):
    rotation, _ = np.linalg.qr(random.normal(size=(3, 3)))
    modeller.add(water, ((atoms - atoms[0]) @ rotation + np.array(cell) * spacing) * unit.nanometer)
topology = modeller.topology
topology.setUnitCellDimensions(openmm.Vec3(n, n, n) * spacing * unit.nanometer)

# Forces that sum to a gradient: direct ones heat a liquid. Heavier hydrogens allow the outer step, and change neither density nor structure.
system = SE3Potential("se3-ani1x", forces="mts-fast", inner_steps=4).createSystem(topology, hydrogenMass=3)
keep_molecules_whole(topology, system)  # or the barostat would stretch every O-H bond with the box
system.addForce(openmm.MonteCarloBarostat(1 * unit.bar, 300 * unit.kelvin, 25))
integrator = MultipleTimeStepIntegrator(300 * unit.kelvin, 5 / unit.picosecond, 2 * unit.femtosecond, 4, fastInSlow=True)
simulation = app.Simulation(topology, system, integrator)
simulation.context.setPositions(modeller.positions)
simulation.context.setVelocitiesToTemperature(300 * unit.kelvin)
mass = sum((system.getParticleMass(i) for i in range(system.getNumParticles())), 0 * unit.dalton)
for _ in range(4):
    simulation.step(max(arguments.steps // 4, 1))
    volume = simulation.context.getState().getPeriodicBoxVolume()
    density = (mass / volume).value_in_unit(unit.gram / unit.item / unit.milliliter)
    molecules = len(simulation.context.getMolecules())
    print(f"step {simulation.currentStep:6d}  volume {volume._value:.4f} nm^3  density {density:.3f} g/cm^3  {molecules} molecules")
