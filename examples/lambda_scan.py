"""From a force field to the model: the free energy of switching alanine dipeptide from one to the other, by thermodynamic integration.

    python examples/lambda_scan.py --windows 11 --steps 20000

The mixed energy is linear in lambda, so its derivative is the difference of its ends; its mean at each lambda is integrated.
"""

import argparse
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit
from scipy.integrate import trapezoid

from openmm_se3 import SE3Potential

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--windows", type=int, default=5)
parser.add_argument("--steps", type=int, default=200, help="of 0.5 fs, in each window, half of them to equilibrate")
arguments = parser.parse_args()

pdb = app.PDBFile(str(Path(__file__).parent / "alanine_dipeptide_residues.pdb"))
classical = app.ForceField("amber14-all.xml").createSystem(pdb.topology)
atoms = range(pdb.topology.getNumAtoms())
system = SE3Potential("se3-ani1x", forces="conservative").createMixedSystem(pdb.topology, classical, atoms, interpolate=True)
integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 5 / unit.picosecond, 0.5 * unit.femtosecond)
integrator.setRandomNumberSeed(1)
context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
context.setPositions(pdb.positions)


def energy(value):
    """Potential energy at a lambda, kJ/mol."""
    context.setParameter("lambda_interpolate", value)
    return context.getState(getEnergy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)


lambdas, means = np.linspace(0, 1, arguments.windows), []
for value in lambdas:
    context.setParameter("lambda_interpolate", value)
    integrator.step(arguments.steps // 2)
    samples = []
    for _ in range(10):
        context.setParameter("lambda_interpolate", value)
        integrator.step(max(arguments.steps // 20, 1))
        samples.append(energy(1.0) - energy(0.0))
    means.append(np.mean(samples))
    print(f"lambda {value:.2f}  <dU/dlambda> {means[-1]:10.2f} kJ/mol, standard deviation {np.std(samples):.2f}")
print(f"free energy of switching {trapezoid(means, lambdas):.2f} kJ/mol")
