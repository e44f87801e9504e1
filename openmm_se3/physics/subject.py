"""The model under measurement, in float64, and what several measures need of it: surfaces, minima, thermal frames."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers
from ase.optimize import LBFGS

from openmm_se3.calculator import SE3Calculator
from openmm_se3.model_file import load_model
from openmm_se3.physics.harmonic import jacobian, normal_modes, thermal_displacement
from openmm_se3.physics.molecules import starting_structure
from openmm_se3.physics.units import ANGSTROM_PER_NM

#: Note of a section that measures direct forces, of a model that was not trained for them.
NO_DIRECT = "direct forces left out: the model was not trained for them"

FORCE_TOLERANCE = 1e-4  # eV/Angstrom, of minima; far below what frequencies to 0.1% need
MOST_STEPS = 500  # on the way to one


class NotConvergedError(RuntimeError):
    """The model has no minimum near the structure, or the way to it is too rough; the message says for which molecule."""


class Surface:
    """Energy and both kinds of forces of one molecule without a box, in float64.

    Parameters
    ----------
    module : ScriptModule
        From `load_model`, in float64.
    numbers : sequence of int
        ``(n_atoms,)`` atomic numbers.
    """

    def __init__(self, module: torch.jit.ScriptModule, numbers: Sequence[int]) -> None:
        self._module = module
        self._numbers = torch.tensor(list(numbers), dtype=torch.int64)

    def energy(self, positions: np.ndarray) -> float:
        """Energy, kJ/mol, of positions ``(n_atoms, 3)`` nm."""
        with torch.no_grad():
            return float(self._module.energy(torch.tensor(positions, dtype=torch.float64), self._numbers, None))

    def conservative(self, positions: np.ndarray) -> np.ndarray:
        """Minus the gradient of the energy, ``(n_atoms, 3)`` kJ/mol/nm."""
        x = torch.tensor(positions, dtype=torch.float64, requires_grad=True)
        energy = self._module.energy(x, self._numbers, None)
        return np.asarray(-torch.autograd.grad([energy], [x])[0].numpy())

    def direct(self, positions: np.ndarray) -> np.ndarray:
        """The network's own force output, ``(n_atoms, 3)`` kJ/mol/nm."""
        return np.asarray(self._module(torch.tensor(positions, dtype=torch.float64), self._numbers, None)[1].numpy())


@dataclass(frozen=True)
class Minimum:
    """A molecule at the model's minimum: ``atoms`` (Angstrom), wavenumbers (1/cm) and mass-weighted modes of `normal_modes`."""

    atoms: Atoms
    wavenumbers: np.ndarray
    modes: np.ndarray

    @property
    def symbols(self) -> list[str]:
        """``(n_atoms,)`` chemical symbols."""
        return list(self.atoms.get_chemical_symbols())

    @property
    def positions_nm(self) -> np.ndarray:
        """``(n_atoms, 3)`` nm."""
        return np.asarray(self.atoms.positions / ANGSTROM_PER_NM)


class Subject:
    """A model that is measured.

    Parameters
    ----------
    model : str or Path
        Name of a released model, or path.

    Raises
    ------
    ModelFileError
        If it cannot be opened.
    """

    def __init__(self, model: str | Path) -> None:
        self.model = str(model)
        self.module = load_model(model)
        self.metadata = self.module.metadata
        self.module.to(torch.float64)
        self.calculator = SE3Calculator(model, forces="conservative", precision="double")
        self._minima: dict[str, Minimum] = {}

    def knows(self, symbols: Iterable[str]) -> bool:
        """Whether the model was trained on all these elements."""
        return set(symbols) <= set(self.metadata.elements)

    def surface(self, symbols: list[str]) -> Surface:
        """Energy and forces of a molecule of these elements."""
        return Surface(self.module, [atomic_numbers[s] for s in symbols])

    def relax(self, atoms: Atoms, name: str) -> Atoms:
        """The minimum of the conservative model in the basin of `atoms`.

        Raises
        ------
        NotConvergedError
            If forces do not fall under `FORCE_TOLERANCE`.
        """
        moved = atoms.copy()
        moved.calc = self.calculator
        if not LBFGS(moved, maxstep=0.05, logfile=None).run(fmax=FORCE_TOLERANCE, steps=MOST_STEPS):
            raise NotConvergedError(
                f"{name}: no minimum within {MOST_STEPS} steps (largest force {np.linalg.norm(moved.get_forces(), axis=1).max():.2g} eV/Angstrom)"
            )
        return Atoms(moved.numbers, positions=moved.positions)

    def minimum(self, name: str, start: Atoms | None = None) -> Minimum:
        """Minimum and harmonic modes of a molecule, computed once; `start` defaults to the `starting_structure` of that name."""
        if name not in self._minima:
            atoms = self.relax(starting_structure(name) if start is None else start, name)
            x = np.asarray(atoms.positions / ANGSTROM_PER_NM)
            hessian = -jacobian(self.surface(atoms.get_chemical_symbols()).conservative, x)
            self._minima[name] = Minimum(atoms, *normal_modes(hessian, x, atoms.get_masses()))
        return self._minima[name]

    def thermal_frames(self, name: str, temperature: float, count: int, seed: int) -> list[np.ndarray]:
        """Frames ``(n_atoms, 3)`` nm of the classical harmonic ensemble about the minimum."""
        at = self.minimum(name)
        rng = np.random.default_rng(seed)
        return [at.positions_nm + thermal_displacement(at.wavenumbers, at.modes, at.atoms.get_masses(), temperature, rng) for _ in range(count)]


def left_out(subject: Subject, molecules: Mapping[str, Iterable[str]]) -> list[str]:
    """A note naming those of the molecules, with their elements, that the model was not trained on; empty where it knows all."""
    names = [name for name, symbols in molecules.items() if not subject.knows(symbols)]
    return [f"left out, with elements that the model was not trained on: {', '.join(names)}"] if names else []
