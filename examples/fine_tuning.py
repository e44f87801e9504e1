"""Fine-tune the released model on your own extended XYZ file: prepare, fit, evaluate before and after, export, simulate.

    python examples/fine_tuning.py --steps 300 --output tuned

Without ``--data`` the file is made here: small alcohols and amines, shaken at 300 K's amplitude, with energies and forces of RDKit's
MMFF94 in place of your quantum-chemistry program. In a checkout, with the extra ``training``.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import yaml
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

sys.path.insert(0, str(Path(__file__).parent.parent))  # `training` is in the checkout only

from openmm_se3.cli import app as openmm_se3
from training.__main__ import app as training

MOLECULES = ("CO", "CCO", "CCCO", "CN", "CCN", "CCCN")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, help="extended XYZ with an energy and forces (eV, eV/Angstrom) for each frame; by default made here")
parser.add_argument("--frames", type=int, default=20, help="of each molecule, where the file is made here")
parser.add_argument("--steps", type=int, default=100, help="of training")
parser.add_argument("--output", type=Path, default=Path("tuned"))
arguments = parser.parse_args()


def labelled_frames(smiles, count, random):
    """Frames around a minimum of MMFF94, with its energies and forces."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(molecule, randomSeed=1)
    AllChem.MMFFOptimizeMolecule(molecule)
    field = AllChem.MMFFGetMoleculeForceField(molecule, AllChem.MMFFGetMoleculeProperties(molecule))
    symbols = [atom.GetSymbol() for atom in molecule.GetAtoms()]
    minimum = molecule.GetConformer().GetPositions()
    for _ in range(count):
        atoms = Atoms(symbols, minimum + random.normal(scale=0.04, size=minimum.shape))
        flat = atoms.positions.ravel().tolist()
        energy = field.CalcEnergy(flat) * units.kcal / units.mol
        forces = -np.array(field.CalcGrad(flat)).reshape(-1, 3) * units.kcal / units.mol
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        yield atoms


def run(command, *words):
    """One command of the package, printed as it would be typed."""
    words = [str(word) for word in words]
    print("$", "python -m training" if command is training else "openmm-se3", *words)
    command(words, standalone_mode=False)


out = arguments.output
out.mkdir(parents=True)
data = arguments.data
if data is None:
    data, random = out / "my_data.xyz", np.random.default_rng(0)
    write(data, [atoms for smiles in MOLECULES for atoms in labelled_frames(smiles, arguments.frames, random)], format="extxyz")
configuration = {
    "data": str(out / "packed"),
    "initial_model": "se3-ani1x",
    "loss": {"energy_weight": 1.0, "force_weight": 1.0, "conservative_weight": 0.3},
    "optimizer": {"learning_rate": 3e-4, "warmup_steps": min(20, arguments.steps), "ema_decay": 0.9},
    "run": {"max_steps": arguments.steps, "validate_every": max(arguments.steps // 4, 1), "batch_molecules": 10},
}
(out / "config.yaml").write_text(yaml.safe_dump(configuration, sort_keys=False))

# Whole formulas are held out: the errors below are those on molecules that the training never saw.
run(training, "prepare", data, "--output", out / "packed", "--validation", 0.3)
run(training, "evaluate", "se3-ani1x", out / "packed", "--split", "validation", "--align-energies", "--output", out / "before")
run(training, "fit", out / "config.yaml", "--output", out / "run")
run(training, "evaluate", out / "run" / "last.ckpt", out / "packed", "--split", "validation", "--align-energies", "--output", out / "after")
run(training, "export", out / "run" / "last.ckpt", out / "tuned.pt", "--metrics", f"validation={out / 'after' / 'metrics.json'}")
structure = Path(__file__).parent / "ethanol.sdf"
run(openmm_se3, "simulate", structure, "--model", out / "tuned.pt", "--steps", 20, "--report-every", 10, "--output", out / "ethanol-md")

for label in ("before", "after"):
    metrics = json.loads((out / label / "metrics.json").read_text())
    energy, force = (metrics[f"{key}_rmse_kcal_per_mol{unit}"] for key, unit in (("energy", ""), ("force", "_per_angstrom")))
    print(f"{label:>6}: molecules held out, RMSE of energies {energy:.2f} kcal/mol, of forces {force:.2f} kcal/mol/Å")
