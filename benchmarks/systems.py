"""The structures that are timed, as PDB files."""

import re
from pathlib import Path

import numpy as np
from openmm import Vec3, app, unit

from openmm_se3.structures import read_structure

EXAMPLES = Path(__file__).parent.parent / "examples"
MOLECULES = {"water": "water.xyz", "ethanol": "ethanol.sdf", "alanine-dipeptide": "alanine_dipeptide.pdb"}
NAMES = ", ".join(MOLECULES) + ", or waterN: a periodic box of N waters"


def write_structure(name, directory):
    """Write a structure by name; returns its file and its number of atoms."""
    path = Path(directory) / f"{name}.pdb"
    if name in MOLECULES:
        topology, positions = read_structure(EXAMPLES / MOLECULES[name])
    elif re.fullmatch(r"water[1-9]\d*", name):
        topology, positions = water_box(int(name.removeprefix("water")))
    else:
        raise ValueError(f"no structure {name!r}; there are {NAMES}")
    with open(path, "w") as file:
        app.PDBFile.writeFile(topology, positions * unit.nanometer, file)
    return path, topology.getNumAtoms()


def water_box(molecules):
    """Topology and positions (nm) of a cubic periodic box of liquid water.

    OpenMM's equilibrated water, not the lattice of `openmm_se3.physics.water_box`, which must first melt: of 216 waters an atom has at
    most 62 neighbours within 0.5 nm there, 69 here, so times, memory and the width of CUDA graphs would be others than those that are stored.
    """
    modeller = app.Modeller(app.Topology(), [] * unit.nanometer)
    modeller.addSolvent(app.ForceField("tip3p.xml"), numAdded=molecules)
    # addSolvent sizes the box for a molecule in it; the density of the liquid follows from the number.
    edge = (molecules * 0.02992) ** (1 / 3)
    x = modeller.positions.value_in_unit(unit.nanometer)
    have = modeller.topology.getPeriodicBoxVectors()[0][0].value_in_unit(unit.nanometer)
    scaled = list(x)
    for residue in modeller.topology.residues():
        atoms = [a.index for a in residue.atoms()]
        shift = x[atoms[0]] * (edge / have - 1)
        for i in atoms:
            scaled[i] = x[i] + shift
    modeller.topology.setPeriodicBoxVectors([Vec3(edge, 0, 0), Vec3(0, edge, 0), Vec3(0, 0, edge)] * unit.nanometer)
    return modeller.topology, np.array([list(v) for v in scaled])
