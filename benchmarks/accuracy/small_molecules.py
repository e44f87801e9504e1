"""Harmonic wavenumbers of small molecules by the ANI-1x ensemble, and by models: where labels of the surrogate mislead.

    python -m benchmarks.accuracy.small_molecules [MODEL ...]

Prints errors in percent, mode by mode in ascending order, relative to wB97X/6-31G(d). Needs torchani 2.2.4 beside the extra `training`.
"""

import sys

import numpy as np
from ase.calculators.calculator import Calculator
from ase.optimize import BFGS

from openmm_se3 import SE3Calculator
from openmm_se3.physics.harmonic import jacobian, normal_modes
from openmm_se3.physics.reference import ReferenceMolecule, level_of_theory, reference_molecules
from training.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV


def wavenumber_errors(calculator: Calculator, reference: ReferenceMolecule) -> np.ndarray:
    """Percent, ``(n_modes,)``, at the calculator's own minimum."""
    atoms = reference.atoms.copy()
    atoms.calc = calculator
    BFGS(atoms, logfile=None).run(fmax=1e-4, steps=300)

    def force(positions_nm: np.ndarray) -> np.ndarray:
        atoms.positions = positions_nm * ANGSTROM_PER_NM
        return atoms.get_forces() * KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM

    at = atoms.positions / ANGSTROM_PER_NM
    wavenumbers, _ = normal_modes(-jacobian(force, at), at, atoms.get_masses())
    return 100 * (wavenumbers / reference.wavenumbers - 1)


def main() -> None:
    """Command line."""
    from benchmarks.accuracy.teachers import ANI1xEnsemble

    # The molecules are at their minima: the limits on the networks' disagreement are for labels.
    calculators = {"ANI-1x ensemble": ANI1xEnsemble(max_force_std=np.inf, max_energy_std=np.inf)}
    calculators.update({model: SE3Calculator(model, forces="conservative") for model in sys.argv[1:]})
    for name, reference in reference_molecules().items():
        print(f"{name}: 1/cm by {level_of_theory()}: {' '.join(f'{w:.0f}' for w in reference.wavenumbers)}")
        for origin, calculator in calculators.items():
            print(f"    {origin}, error in %: {' '.join(f'{e:+.1f}' for e in wavenumber_errors(calculator, reference))}", flush=True)


if __name__ == "__main__":
    main()
