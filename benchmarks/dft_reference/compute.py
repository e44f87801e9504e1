"""Reference values of `openmm-se3 validate --physics` by density functional theory: wB97X/6-31G(d), the level of the ANI-1x data.

    pip install pyscf==2.14.0
    PYTHONPATH=. python benchmarks/dft_reference/compute.py openmm_se3/physics/dft_reference.json

- geometry, energy and harmonic frequencies of small molecules;
- energies along rigid torsions of ethanol (H-O-C-C) and butane (C-C-C-C), all else as in the G2 set;
- energies along one stretched O-H bond of water (spin-restricted), and along the O-O distance of a water dimer.

Cartesian d functions, as in Gaussian's 6-31G(d); no density fitting. Geometries start from ASE's G2 set. What the file holds
already is not computed again, so an interrupted run goes on where it stopped. About a quarter of an hour on one core.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pyscf
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.neighborlist import natural_cutoffs, neighbor_list
from ase.optimize import BFGS
from pyscf import dft, gto

from openmm_se3.physics.harmonic import normal_modes
from openmm_se3.physics.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_HARTREE
from training.files import replacing

MOLECULES = {"water": "H2O", "ammonia": "NH3", "methane": "CH4", "hydrogen cyanide": "HCN", "formaldehyde": "H2CO", "methanol": "CH3OH"}
GRID_LEVEL = 4
FORCE_TOLERANCE = 5e-4  # eV/Angstrom


def mean_field(atoms):
    """Converged wB97X/6-31G(d) of a closed-shell molecule."""
    mol = gto.M(atom=list(zip(atoms.get_chemical_symbols(), atoms.positions, strict=True)), basis="6-31g(d)", cart=True, verbose=0)
    field = dft.RKS(mol, xc="wb97x")
    field.grids.level = GRID_LEVEL
    field.conv_tol = 1e-10
    field.kernel()
    if not field.converged:
        raise RuntimeError(f"the self-consistent field of {atoms.get_chemical_formula()} did not converge")
    return field


def energy(atoms):
    """Total energy, Hartree."""
    return float(mean_field(atoms).e_tot)


class DFT(Calculator):
    """Energy and forces for ASE's optimiser."""

    implemented_properties = ("energy", "forces")

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        """Called by ASE."""
        super().calculate(atoms, properties, system_changes)
        field = mean_field(self.atoms)
        gradient = field.nuc_grad_method()
        gradient.grid_response = True
        self.results = {"energy": field.e_tot * units.Hartree, "forces": -gradient.kernel() * units.Hartree / units.Bohr}


def minimum(name):
    """A molecule of the G2 set at its DFT minimum."""
    atoms = molecule(name)
    atoms.calc = DFT()
    if not BFGS(atoms, logfile=None).run(fmax=FORCE_TOLERANCE, steps=100):
        raise RuntimeError(f"the geometry of {name} did not converge")
    return Atoms(atoms.get_chemical_symbols(), positions=atoms.positions)


def frequencies(atoms):
    """Harmonic wavenumbers, 1/cm, with ASE's (average) atomic masses."""
    field = mean_field(atoms)
    blocks = field.Hessian().kernel()  # (n, n, 3, 3) Hartree/Bohr^2
    n = len(atoms)
    hessian = blocks.transpose(0, 2, 1, 3).reshape(3 * n, 3 * n)
    hessian = hessian * KJ_PER_MOL_PER_HARTREE / (units.Bohr / units.nm) ** 2
    return normal_modes(hessian, atoms.positions / ANGSTROM_PER_NM, atoms.get_masses())[0].tolist()


def torsion(atoms, quadruple, group, angles):
    """Frames with the dihedral at `angles` degrees; `group` turns, all else stays."""
    frames = []
    for angle in angles:
        frame = atoms.copy()
        frame.set_dihedral(*quadruple, float(angle), indices=group)
        frames.append(frame)
    return frames


def beyond(atoms, pivot, end):
    """Atoms on the side of `end` of the bond between `pivot` and `end`."""
    bonds: dict[int, set[int]] = {}
    for i, j in zip(*neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.15)), strict=True):
        bonds.setdefault(int(i), set()).add(int(j))
    side, stack = {end}, [end]
    while stack:
        new = bonds[stack.pop()] - side - {pivot}
        side |= new
        stack += new
    return sorted(side)


def torsion_of(atoms, quadruple, step=20):
    """Angles 0 to 180 degrees and their frames."""
    angles = np.arange(0, 181, step)
    return angles, torsion(atoms, quadruple, beyond(atoms, quadruple[1], quadruple[2]), angles)


def water_stretch(water):
    """One O-H bond of water from 0.7 to 1.8 Angstrom; the other bond and the angle stay."""
    lengths = np.round(np.arange(0.70, 1.81, 0.1), 3)
    frames = []
    for length in lengths:
        frame = water.copy()
        frame.set_distance(0, 1, float(length), fix=0)
        frames.append(frame)
    return lengths, frames


def water_dimer(water):
    """Two waters at their minimum, one donating a straight hydrogen bond, its plane the mirror plane of the other; O-O distance scanned."""
    donor = water.copy()
    donor.translate(-donor.positions[0])
    donor.rotate(donor.positions[1], "x")
    # The donor lies in the xz plane, its hydrogen on the x axis.
    second = donor.positions[2]
    donor.rotate(np.degrees(np.arctan2(second[1], second[2])), "x")
    acceptor = water.copy()
    acceptor.translate(-acceptor.positions[0])
    bisector = acceptor.positions[1] + acceptor.positions[2]
    acceptor.rotate(bisector, "x")
    normal = np.cross(acceptor.positions[1], acceptor.positions[2])
    acceptor.rotate(np.degrees(np.arctan2(normal[1], normal[2])), "x")
    # Turn the acceptor's plane to hold the y axis, then tilt it so that a lone pair looks at the donor.
    acceptor.rotate(55.0, "y")
    distances = np.array([2.2, 2.4, 2.6, 2.7, 2.8, 2.9, 3.0, 3.2, 3.5, 4.0, 4.5, 5.0, 6.0])
    frames = []
    for d in distances:
        moved = acceptor.copy()
        moved.translate([d, 0, 0])
        frames.append(donor + moved)
    return distances, frames


def main():
    """Compute what is missing, save after each item."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    path = parser.parse_args().output
    data = json.loads(path.read_text()) if path.exists() else {"molecules": {}, "curves": {}}
    data["provenance"] = {
        "level_of_theory": "wB97X/6-31G(d)",
        "program": f"PySCF {pyscf.__version__}",
        "settings": f"Cartesian d functions, no density fitting, grid level {GRID_LEVEL}, geometries to {FORCE_TOLERANCE} eV/Angstrom, "
        "analytic second derivatives, average atomic masses",
        "script": "benchmarks/dft_reference/compute.py",
    }

    def save():
        with replacing(path) as partial:
            partial.write_text(json.dumps(data, indent=1) + "\n")

    def described(atoms):
        return {"symbols": atoms.get_chemical_symbols(), "positions_angstrom": np.round(atoms.positions, 6).tolist()}

    def stored(name):
        entry = data["molecules"][name]
        return Atoms(entry["symbols"], positions=entry["positions_angstrom"])

    def curve(name, coordinate, unit, values, frames):
        if name in data["curves"]:
            return
        data["curves"][name] = {
            "coordinate": coordinate,
            "unit": unit,
            "values": [float(v) for v in values],
            "symbols": frames[0].get_chemical_symbols(),
            "positions_angstrom": [np.round(f.positions, 6).tolist() for f in frames],
            "energies_hartree": [energy(f) for f in frames],
        }
        save()
        print(f"{name}: {len(frames)} energies", flush=True)

    for name, formula in MOLECULES.items():
        if name not in data["molecules"]:
            atoms = minimum(formula)
            data["molecules"][name] = {**described(atoms), "energy_hartree": energy(atoms)}
            save()
            print(f"{name}: geometry", flush=True)
        if "wavenumbers_per_cm" not in data["molecules"][name]:
            found = frequencies(stored(name))
            data["molecules"][name]["wavenumbers_per_cm"] = [round(f, 3) for f in found]
            save()
            print(f"{name}: {', '.join(f'{f:.1f}' for f in found)} 1/cm", flush=True)
        if name == "water":
            curve("water O-H", "O-H distance", "Angstrom", *water_stretch(stored(name)))
            curve("water dimer O-O", "O-O distance", "Angstrom", *water_dimer(stored(name)))
    # Ethanol is C C O H(O) ..., butane C C C C ...
    curve("ethanol H-O-C-C", "H-O-C-C dihedral", "degree", *torsion_of(molecule("CH3CH2OH"), (3, 2, 1, 0)))
    curve("butane C-C-C-C", "C-C-C-C dihedral", "degree", *torsion_of(molecule("trans-butane"), (0, 1, 2, 3)))


if __name__ == "__main__":
    main()
