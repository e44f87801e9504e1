"""ASE calculators that label training data as the data of the released model were labelled, for `python -m training label --calculator`.

    --calculator benchmarks.accuracy.teachers:ANI1xEnsemble      torchani 2.2.4, the mean of its eight ANI-1x networks
    --calculator benchmarks.accuracy.teachers:DFT                PySCF, wB97X/6-31G(d), the level that those networks were trained on

Both give total energies on one scale: the networks' own self-energies are those of their DFT data.
"""

from functools import cache
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.data import covalent_radii
from scipy.sparse.csgraph import connected_components

from training.label.errors import NotTrustedError

_VALENCE = {1: 1, 6: 4, 7: 5, 8: 6}
#: Unpaired electrons of the free atoms.
_OPEN_SHELLS = {1: 1, 6: 2, 7: 3, 8: 2}
#: Pairs farther apart than this times the sum of their covalent radii are no longer bonded.
_BONDED = 1.3


@cache
def _networks() -> Any:
    import torchani

    return torchani.models.ANI1x(periodic_table_index=True).double()


class ANI1xEnsemble(Calculator):
    """Mean of the eight networks of ANI-1x (Smith et al., J. Chem. Phys. 148, 241733 (2018)).

    Parameters
    ----------
    max_force_std, max_energy_std : float
        Largest root-mean-square disagreement of the networks on a force component, eV/Angstrom, and on the energy per square root of an atom,
        eV, that is taken for a label; beyond, the calculation fails, and `label` leaves the frame out.
    """

    implemented_properties = ("energy", "forces")

    def __init__(self, max_force_std: float = 0.39, max_energy_std: float = 0.05) -> None:
        super().__init__()
        self._model = _networks()
        self.max_force_std, self.max_energy_std = max_force_std, max_energy_std

    def calculate(self, atoms: Atoms | None = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        """Called by ASE."""
        super().calculate(atoms, properties, system_changes)
        import torch

        numbers = torch.tensor(self.atoms.numbers[None].astype(np.int64))
        networks = self._model.neural_networks
        # A copy for each network: one pass back through the atomic environments gives the forces of all.
        positions = torch.tensor(self.atoms.positions).repeat(len(networks), 1, 1).requires_grad_(True)
        species = self._model.species_converter((numbers.repeat(len(networks), 1), positions)).species
        environments = self._model.aev_computer((species, positions)).aevs
        energies = torch.cat([n((species[k : k + 1], environments[k : k + 1])).energies for k, n in enumerate(networks)])
        forces = -torch.autograd.grad(energies.sum(), positions)[0] * units.Hartree
        energies = (energies.detach() + self._model.energy_shifter.sae(species)) * units.Hartree
        force_std = float(forces.std(0, correction=0).square().mean().sqrt())
        energy_std = float(energies.std(correction=0)) / len(self.atoms) ** 0.5
        if force_std > self.max_force_std or energy_std > self.max_energy_std:
            raise NotTrustedError("the ensemble disagrees with itself")
        self.results = {"energy": float(energies.mean()), "forces": forces.mean(0).numpy()}


class DFT(Calculator):
    """wB97X/6-31G(d) with Cartesian d functions and density fitting; parts of a broken molecule become radicals.

    A molecule in one piece is treated as a closed shell. Where a bond is broken, so that two pieces have odd numbers of electrons, the
    unrestricted solution with opposite spins on the two ends is sought, which goes to two separate radicals; the restricted one would go to a
    mixture with ions, high above them. Radicals and free atoms by themselves get the spin of their ground state.

    Parameters
    ----------
    grid_level : int
        Of PySCF's integration grid.
    """

    implemented_properties = ("energy", "forces")

    def __init__(self, grid_level: int = 2) -> None:
        super().__init__()
        import pyscf.dft
        import pyscf.gto

        self._pyscf = pyscf
        self.grid_level = grid_level

    def calculate(self, atoms: Atoms | None = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        """Called by ASE."""
        super().calculate(atoms, properties, system_changes)
        numbers = self.atoms.numbers
        pieces = _pieces(self.atoms)
        radicals = [piece for piece in pieces if numbers[piece].sum() % 2]
        spin = _OPEN_SHELLS[int(numbers[0])] if len(numbers) == 1 else len(radicals) % 2
        geometry = list(zip(self.atoms.get_chemical_symbols(), self.atoms.positions, strict=True))
        mol = self._pyscf.gto.M(atom=geometry, basis="6-31g(d)", cart=True, verbose=0, spin=spin)
        polarised = spin > 0 or len(radicals) > 1
        field = (self._pyscf.dft.UKS if polarised else self._pyscf.dft.RKS)(mol, xc="wb97x").density_fit()
        field.grids.level = self.grid_level
        field.conv_tol = 1e-8
        guess = field.get_init_guess()
        if len(radicals) == 2:
            ends = _closest(self.atoms.positions, *radicals)
            for atom, sign in zip(ends, (1.0, -1.0), strict=True):
                part = slice(*mol.aoslice_by_atom()[atom][2:])
                guess[0][part, part] *= 1.0 + sign / _VALENCE[int(numbers[atom])]
                guess[1][part, part] *= 1.0 - sign / _VALENCE[int(numbers[atom])]
        elif len(radicals) > 2:
            raise NotTrustedError("more than two radicals: which spins couple is not known")
        field.kernel(guess)
        if not field.converged:
            raise NotTrustedError("the self-consistent field did not converge")
        gradient = field.nuc_grad_method().kernel() if len(numbers) > 1 else np.zeros((1, 3))
        self.results = {"energy": float(field.e_tot) * units.Hartree, "forces": -gradient * units.Hartree / units.Bohr}


def _pieces(atoms: Atoms) -> list[np.ndarray]:
    radii = covalent_radii[atoms.numbers]
    n, label = connected_components(atoms.get_all_distances() < _BONDED * (radii[:, None] + radii[None]), directed=False)
    return [np.flatnonzero(label == k) for k in range(n)]


def _closest(positions: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    distance = np.linalg.norm(positions[first][:, None] - positions[second][None], axis=-1)
    i, j = np.unravel_index(distance.argmin(), distance.shape)
    return int(first[i]), int(second[j])
