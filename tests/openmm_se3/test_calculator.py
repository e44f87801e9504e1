import pickle
from itertools import permutations

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS

from openmm_se3 import SE3Calculator, SE3Potential
from openmm_se3.errors import UnsupportedSystemError
from openmm_se3.structures import reduced_cell
from tests.openmm_se3.helpers import MODEL, energy_and_forces, ethanol


def test_same_numbers_as_openmm():
    topology, positions = ethanol()
    atoms = Atoms([a.element.symbol for a in topology.atoms()], positions=positions * units.nm)
    for mode in ("direct", "conservative"):
        atoms.calc = SE3Calculator(MODEL, forces=mode)
        energy, forces = energy_and_forces(SE3Potential(MODEL, forces=mode, precision="double").createSystem(topology), positions)
        assert atoms.get_potential_energy() == pytest.approx(energy * units.kJ / units.mol, abs=1e-8)
        np.testing.assert_allclose(atoms.get_forces(), forces * units.kJ / units.mol / units.nm, atol=1e-8)


def test_forces_belong_to_the_energy_and_an_optimiser_converges():
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.02, seed=1)
    atoms.calc = SE3Calculator(MODEL)
    np.testing.assert_allclose(atoms.get_forces(), calculate_numerical_forces(atoms, eps=1e-5), atol=1e-5)
    assert BFGS(atoms, logfile=None).run(fmax=0.01, steps=200)


def test_periodic_in_any_orientation():
    """A rotated cell with its atoms gives the same energy and rotated forces; ASE cells need not be lower triangular."""
    atoms = molecule("CH3CH2OH")
    atoms.set_cell([[13.0, 0, 0], [3.0, 14.0, 0], [-4.0, 2.0, 15.0]])
    atoms.pbc = True
    atoms.calc = SE3Calculator(MODEL)
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    turned = atoms.copy()
    turned.rotate(40, (1, 2, 3), rotate_cell=True)
    turned.calc = SE3Calculator(MODEL)
    assert turned.get_potential_energy() == pytest.approx(energy, abs=1e-8)
    check = Atoms("H" * 9, positions=forces)
    check.rotate(40, (1, 2, 3))
    np.testing.assert_allclose(turned.get_forces(), check.positions, atol=1e-8)


def crystal():
    """Nitrogen molecules that meet through the faces of a small triclinic cell, in no special orientation."""
    atoms = Atoms("N4", positions=[[1.0, 1.0, 1.0], [1.7, 1.6, 1.6], [6.0, 6.5, 9.0], [6.4, 7.3, 9.6]])
    atoms.set_cell([[10.4, 0, 0], [2.0, 10.6, 0], [-3.0, 1.5, 10.8]])
    atoms.pbc = True
    atoms.rotate(25, (3, -1, 2), rotate_cell=True)
    return atoms


class TestStress:
    def test_is_the_derivative_by_strain(self):
        atoms = crystal()
        atoms.calc = SE3Calculator(MODEL)
        stress = atoms.get_stress()
        np.testing.assert_allclose(stress, calculate_numerical_stress(atoms, eps=1e-5), atol=1e-8)
        assert np.abs(stress).max() > 1e-4
        # A lattice vector added to one atom is the same crystal.
        atoms.positions[1] += atoms.cell[2] - atoms.cell[0]
        np.testing.assert_allclose(atoms.get_stress(), stress, atol=1e-10)

    def test_comes_with_the_forces(self):
        """One evaluation for a cell filter, which asks for both."""
        atoms = crystal()
        atoms.calc = SE3Calculator(MODEL)
        FrechetCellFilter(atoms).get_forces()
        assert not atoms.calc.calculation_required(atoms, ["energy", "forces", "stress"])

    def test_forces_are_the_same_without_it(self):
        atoms = crystal()
        atoms.calc = SE3Calculator(MODEL)
        forces, energy = atoms.get_forces(), atoms.get_potential_energy()
        atoms.get_stress()
        np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-8)
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-10)
        atoms.rattle(0.01, seed=1)
        atoms.get_forces()
        assert not atoms.calc.calculation_required(atoms, ["energy", "forces", "stress"])  # it was asked for before

    def test_refusals(self):
        atoms = crystal()
        atoms.calc = SE3Calculator(MODEL, forces="direct")
        assert np.isfinite(atoms.get_forces()).all()
        with pytest.raises(PropertyNotImplementedError, match="use forces='conservative'"):
            atoms.get_stress()
        alone = molecule("H2O")
        alone.calc = SE3Calculator(MODEL)
        with pytest.raises(PropertyNotImplementedError, match="stress needs a periodic cell"):
            alone.get_stress()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.set_chemical_symbols(["Cl", *a.get_chemical_symbols()[1:]]), "not trained on Cl"),
        (lambda a: a.positions.__setitem__((0, 0), np.nan), "NaN"),
        (lambda a: (a.set_cell([20, 20, 20]), a.set_pbc([True, False, True])), "all directions periodic or none"),
        (lambda a: (a.set_cell([20, 20, 9]), a.set_pbc(True)), "box is too small"),
        (lambda a: a.set_pbc(True), "its cell .* has no volume"),
        (lambda a: a.__delitem__(slice(None)), "no atoms"),
        (lambda a: a.info.update(charge=-1), "charge -1 was asked for"),
    ],
)
def test_refusals(change, message):
    atoms = molecule("CH3CH2OH")
    change(atoms)
    atoms.calc = SE3Calculator(MODEL)
    with pytest.raises(UnsupportedSystemError, match=message):
        atoms.get_potential_energy()


def test_a_charge_that_is_set_later_is_refused():
    """ASE would give back the energy that it keeps."""
    atoms = molecule("H2O")
    atoms.calc = SE3Calculator(MODEL)
    atoms.get_potential_energy()
    atoms.info["charge"] = 1
    with pytest.raises(UnsupportedSystemError, match="charge 1 was asked for"):
        atoms.get_potential_energy()


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_every_cell_of_a_lattice_gives_the_same(order):
    """Any order of the vectors, so also left-handed ones, and one with a long vector: energy, forces and stress are those of the lattice."""
    atoms = molecule("CH3CH2OH")
    atoms.set_cell([[11.0, 0, 0], [5.0, 11.5, 0], [-4.5, 5.2, 12.0]])
    atoms.pbc = True
    atoms.calc = SE3Calculator(MODEL)
    expected = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    for cell in (atoms.cell[list(order)], atoms.cell[list(order)] + np.outer([1, 0, 0], 2 * atoms.cell[order[1]])):
        other = Atoms(atoms.numbers, atoms.positions, cell=cell, pbc=True)
        other.calc = atoms.calc
        assert other.get_potential_energy() == pytest.approx(expected[0], abs=1e-9)
        np.testing.assert_allclose(other.get_forces(), expected[1], atol=1e-9)
        np.testing.assert_allclose(other.get_stress(), expected[2], atol=1e-11)


def test_a_cell_that_will_do_is_kept():
    atoms = Atoms("H", cell=[[20.0, 0, 0], [2.0, 22.0, 0], [-3.0, 4.0, 25.0]], pbc=True)
    box, rotation = reduced_cell(atoms)
    np.testing.assert_allclose(box, atoms.cell / 10, atol=1e-12)
    np.testing.assert_allclose(rotation, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("made", [lambda: SE3Calculator(MODEL), lambda: SE3Potential(MODEL, forces="mts", precision="double")])
def test_pickle(made):
    before = made()
    after = pickle.loads(pickle.dumps(before))
    atoms = molecule("CH3CH2OH")
    if isinstance(before, SE3Calculator):
        energies = [calculator.get_potential_energy(atoms) for calculator in (before, after)]
    else:
        energies = [energy_and_forces(p.createSystem(ethanol()[0]), ethanol()[1])[0] for p in (before, after)]
    assert energies[1] == pytest.approx(energies[0], abs=1e-12)


def test_unknown_keywords_are_refused():
    """ASE would keep them, and the default would run."""
    atoms = molecule("H2O")
    with pytest.raises(TypeError, match="unexpected keyword argument 'modle'"):
        SE3Calculator(forces="direct", modle="x.pt", atoms=atoms)
    assert atoms.calc is None
    with pytest.raises(TypeError, match="has no parameters to set, got forces; make a new one"):
        SE3Calculator(MODEL).set(forces="direct")


def test_keywords_of_every_calculator(tmp_path):
    atoms = molecule("H2O")
    calculator = SE3Calculator(MODEL, atoms=atoms, label="water", directory=tmp_path)
    assert atoms.calc is calculator
    assert (calculator.prefix, calculator.directory) == ("water", str(tmp_path))
    assert np.isfinite(atoms.get_potential_energy())
