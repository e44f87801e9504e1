"""Geometry and harmonic frequencies of a molecule with ASE.

python examples/optimise_and_vibrate_with_ase.py --molecule H2O
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from ase.build import molecule
from ase.neighborlist import natural_cutoffs, neighbor_list
from ase.optimize import BFGS
from ase.vibrations import Vibrations

from openmm_se3 import SE3Calculator

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--molecule", default="H2O", help="any name that ase.build.molecule knows, of H, C, N, O")
arguments = parser.parse_args()

atoms = molecule(arguments.molecule)
atoms.calc = SE3Calculator("se3-ani1x")  # conservative forces in double precision
BFGS(atoms, logfile=None).run(fmax=1e-3, steps=500)
bonds = np.unique(neighbor_list("d", atoms, natural_cutoffs(atoms, mult=1.15)).round(4))
print(f"energy {atoms.get_potential_energy():.4f} eV above the model's self-energies; bonds {bonds} Å")
with tempfile.TemporaryDirectory() as folder:
    vibrations = Vibrations(atoms, name=str(Path(folder) / "displaced"))
    vibrations.run()
    frequencies = vibrations.get_frequencies()
print("frequencies, 1/cm:", " ".join(f"{f.real:.0f}" if abs(f.imag) < 1e-6 else f"{f.imag:.0f}i" for f in frequencies[6:]))
