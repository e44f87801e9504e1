"""Every bond of small molecules, pressed and pulled apart until the pieces are free, as an extended XYZ file to be labelled by DFT.

    python -m benchmarks.accuracy.scans O C N CC CO CN > scans.xyz

`label --stretches` ends at twice the length of a bond, and between there and free pieces a network makes up what it likes. The rest of the
molecule is rigid, but for a small random displacement of every atom, by a fixed seed. Of bonds that symmetry makes alike there is one.
"""

import argparse
import sys

import numpy as np
from ase import Atoms
from ase.io import write
from rdkit import Chem

from training.label.scans import hinges, stretched
from training.label.structures import geometries, is_plausible, read_molecules

#: Lengths of the bond in units of its own at rest: denser where the energy changes most. Only hydrogen atoms come as near as the first.
FACTORS = (0.55, 0.65, 0.75, 0.85, 1.1, 1.25, 1.4, 1.55, 1.7, 1.85, 2.0, 2.15, 2.3, 2.45, 2.6, 2.8, 3.0, 3.3, 3.7, 4.2, 4.8)
#: Standard deviation of the random displacements, Angstrom.
DISPLACEMENT = 0.03


def scan(smiles: str, seed: int = 0) -> list[Atoms]:
    """Frames of one bond after the other."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    kind = list(Chem.CanonicalRankAtoms(molecule, breakTies=False))
    rng = np.random.default_rng(seed)
    atoms = geometries(read_molecules([smiles])[0], 1, seed)[0]
    frames, seen = [], set()
    for bond in hinges(atoms):
        ends = frozenset((kind[bond.pivot], kind[bond.end]))
        if ends in seen:
            continue
        seen.add(ends)
        for factor in FACTORS:
            x = stretched(atoms.positions, bond, factor)
            frame = Atoms(atoms.numbers, x + rng.normal(scale=DISPLACEMENT, size=x.shape))
            if is_plausible(frame):
                frames.append(frame)
    return frames


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("smiles", nargs="+")
    for one in parser.parse_args().smiles:
        write(sys.stdout, scan(one), format="extxyz")
