"""Ring systems of medicinal chemistry with small substituents, as SMILES: breadth for the training data of `se3-ani1x`.

    python -m benchmarks.accuracy.rings > rings.smi
    python -m benchmarks.accuracy.rings --variants 20 --seed 1 > more-rings.smi

Every ring system comes bare, and several times with one or two substituents, chosen by a fixed seed.
"""

import argparse
import random

from rdkit import Chem

_RING_SYSTEMS = """
c1cc[nH]c1 c1ccoc1 c1c[nH]cn1 c1cn[nH]c1 c1cocn1 c1cnoc1 c1nc[nH]n1 c1c[nH]nn1 c1nnn[nH]1 c1nnco1 c1ncon1 c1ccccc1 c1ccncc1 c1ccnnc1 c1cncnc1
c1cnccn1 c1ncncn1 O=c1cc[nH]cc1 O=c1cccc[nH]1 O=c1cc[nH]cn1 O=c1cc[nH]c(=O)[nH]1 C1CCNC1 C1CCOC1 C1CNCN1 C1COCO1 C1CNOC1 C1CCNCC1 C1CCOCC1
C1CNCCN1 C1COCCN1 C1COCCO1 C1CCCNCC1 C1CCCCC1 C1CCCC1 C1CC1 C1CCC1 C1CCCCCC1 C1=CCCCC1 C1=CCCC1 C1=CCNCC1 C1=COCCC1 C1=CCC=CC1 C1=CNCC=C1
O=C1CCCN1 O=C1CCCCN1 O=C1CCCO1 O=C1CCC(=O)N1 O=C1CCCC(=O)N1 O=C1CNC(=O)N1 O=C1CC(=O)NC(=O)N1 O=C1NCCN1 O=C1NCCO1 O=C1CCCCC1 O=C1CCCC1
O=C1C=CC(=O)C=C1 O=C1C=CC(=O)N1 C1CO1 C1CN1 C1COC1 C1CNC1 c1ccc2[nH]ccc2c1 c1ccc2[nH]cnc2c1 c1ccc2[nH]ncc2c1 c1ccc2occc2c1 c1ccc2ocnc2c1
c1ccc2oncc2c1 c1ccc2[nH]nnc2c1 c1ccc2ncccc2c1 c1ccc2cnccc2c1 c1ccc2ncncc2c1 c1ccc2nccnc2c1 c1ccc2cnncc2c1 c1ccc2nnccc2c1 c1cnc2ncccc2c1
c1cnc2ccncc2c1 c1cnc2ncncc2n1 c1ncc2nc[nH]c2n1 c1ccn2ccnc2c1 c1ccn2cncc2c1 c1cnn2ccnc2c1 c1cc2cc[nH]c2nc1 c1ncc2cc[nH]c2n1 c1ncc2cn[nH]c2n1
c1ccn2ncnc2c1 c1ccc2[nH]ccc2n1 c1cc2nc[nH]c2cn1 c1ccn2nccc2c1 c1ccn2cccc2c1 c1cnc2cncn2c1 c1ccc2c(c1)CCC2 c1ccc2c(c1)CCCC2 c1ccc2c(c1)CCN2
c1ccc2c(c1)CNC2 c1ccc2c(c1)CCCN2 c1ccc2c(c1)CCNC2 c1ccc2c(c1)OCO2 c1ccc2c(c1)OCCO2 c1ccc2c(c1)CCO2 c1ccc2c(c1)OCCN2 c1ccc2ccccc2c1
c1ccc2cccc-2cc1 O=C1Cc2ccccc2N1 O=C1Nc2ccccc2C1=O O=C1NC(=O)c2ccccc12 O=c1cc[nH]c2ccccc12 O=c1nc[nH]c2ccccc12 O=c1ccoc2ccccc12 O=c1ccc2ccccc2o1
O=C1CCc2ccccc12 O=c1[nH]c2ccccc2[nH]1 O=c1[nH]c2ccccc2o1 O=C1NCc2ccccc12 O=c1[nH]cnc2[nH]cnc12 O=c1cnc2ccccc2[nH]1 c1ccc2c(c1)[nH]c1ccccc12
c1ccc2c(c1)oc1ccccc12 c1ccc2nc3ccccc3cc2c1 c1ccc2c(c1)Cc1ccccc12 c1ccc2c(c1)[nH]c1cnccc12 c1ccc2nc3ccccc3nc2c1 C1CC2CCC1C2 C1CN2CCC1CC2
C1CC2CCC(C1)N2 C1C2CC3CC1CC(C2)C3 C1CCC2CCCCC2C1 C1CCC2(CC1)CCNC2 C1CC2CNCC2C1 C1CCC2NCCC2C1 C1CN2CCCC2C1 C1CC2COCC2N1 c1ccc(-c2ccccc2)cc1
c1ccc(-c2ccccn2)cc1 c1ccc(-c2ncc[nH]2)cc1 c1ccc(-n2cccn2)cc1 c1ccc(-c2nnco2)cc1 c1ccc(N2CCOCC2)cc1 c1ccc(Oc2ccccc2)cc1
"""
_SUBSTITUENTS = """
C N O OC NC N(C)C C#N C=O C(C)=O C(N)=O C(=O)OC NC(C)=O CO CN C(=O)O OC(C)=O C=C C#C CC C(C)C [N+](=O)[O-] CC#N C(C)O NC(N)=O
"""
RING_SYSTEMS = _RING_SYSTEMS.split()
SUBSTITUENTS = _SUBSTITUENTS.split()


def decorate(ring: Chem.Mol, count: int, chooser: random.Random) -> str:
    """A ring system with `count` of its hydrogens on carbon replaced by random substituents; SMILES."""
    for _ in range(count):
        places = [atom.GetIdx() for atom in ring.GetAtoms() if atom.GetSymbol() == "C" and atom.IsInRing() and atom.GetTotalNumHs() > 0]
        if not places:
            break
        substituent = Chem.MolFromSmiles(chooser.choice(SUBSTITUENTS))
        place = chooser.choice(places)
        joined = Chem.RWMol(Chem.CombineMols(ring, substituent))
        joined.AddBond(place, ring.GetNumAtoms(), Chem.BondType.SINGLE)
        ring = joined.GetMol()
        Chem.SanitizeMol(ring)
    return Chem.MolToSmiles(ring)


def decorated_rings(variants: int = 4, most_heavy_atoms: int = 15, seed: int = 0) -> list[str]:
    """Every ring system bare, with one, and with two substituents; SMILES without doubles, sorted by size.

    Parameters
    ----------
    variants : int
        Attempts at substitution for each ring system, half with one substituent, half with two.
    most_heavy_atoms : int
        Larger molecules are left out.
    seed : int
        Of the choice of places and substituents.
    """
    chooser = random.Random(seed)
    found = set()
    for smiles in RING_SYSTEMS:
        ring = Chem.MolFromSmiles(smiles)
        found.add(Chem.MolToSmiles(ring))
        found.update(decorate(ring, 1 + variant % 2, chooser) for variant in range(variants))
    sizes = {smiles: Chem.MolFromSmiles(smiles).GetNumHeavyAtoms() for smiles in found}
    return sorted((smiles for smiles in found if sizes[smiles] <= most_heavy_atoms), key=lambda smiles: (sizes[smiles], smiles))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", type=int, default=4, help="attempts at substitution for each ring system")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of places and substituents")
    arguments = parser.parse_args()
    print("\n".join(decorated_rings(arguments.variants, seed=arguments.seed)))
