"""ML/MM: alanine dipeptide by the model, in water of a classical force field.

python examples/ligand_in_water.py --steps 2000
"""

import argparse
from pathlib import Path

import openmm
from openmm import app, unit

from openmm_se3 import DomainGuard, SE3Potential

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=200, help="steps of 0.5 fs")
parser.add_argument("--padding", type=float, default=1.0, help="water around the solute, nm")
arguments = parser.parse_args()

pdb = app.PDBFile(str(Path(__file__).parent / "alanine_dipeptide_residues.pdb"))
solute = list(range(pdb.topology.getNumAtoms()))
force_field = app.ForceField("amber14-all.xml", "amber14/tip3pfb.xml")
modeller = app.Modeller(pdb.topology, pdb.positions)
modeller.addSolvent(force_field, padding=arguments.padding * unit.nanometer)
classical = force_field.createSystem(modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.7 * unit.nanometer)

# The model describes what is inside the solute; the force field the water, and the water's interaction with the solute.
system = SE3Potential("se3-ani1x", forces="conservative").createMixedSystem(modeller.topology, classical, solute)
integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond)
simulation = app.Simulation(modeller.topology, system, integrator)
simulation.context.setPositions(modeller.positions)
simulation.minimizeEnergy(maxIterations=max(arguments.steps // 10, 1))
simulation.context.setVelocitiesToTemperature(300 * unit.kelvin)
simulation.reporters.append(DomainGuard(modeller.topology, max(arguments.steps // 10, 1), atoms=solute))
simulation.step(arguments.steps)
energy = simulation.context.getState(getEnergy=True).getPotentialEnergy()
print(f"{len(solute)} atoms by the model, {system.getNumParticles() - len(solute)} classical; {arguments.steps} steps; potential energy {energy}")
