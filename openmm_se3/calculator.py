"""`SE3Calculator`: the model as a calculator of the Atomic Simulation Environment (ASE)."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from openmm import Vec3
from openmm.app.internal.unitcell import reducePeriodicBoxVectors

from openmm_se3.binding import MULTIPLE_TIME_STEPS
from openmm_se3.errors import UnsupportedSystemError
from openmm_se3.force import check_box
from openmm_se3.potential import SE3Potential

_KJ_PER_MOL = units.kJ / units.mol


def reduced_cell(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Cell in OpenMM's reduced form, and the rotation into its frame.

    Parameters
    ----------
    atoms : ase.Atoms
        Periodic in all three directions.

    Returns
    -------
    tuple of ndarray
        Box ``(3, 3)`` in nm, rows, lower triangular and reduced; rotation Q ``(3, 3)`` such that ``positions @ Q.T`` are the
        coordinates in the frame of the box.
    """
    lower, rotation = atoms.cell.standard_form()
    vectors = reducePeriodicBoxVectors([Vec3(*row) for row in np.asarray(lower) * units.Ang / units.nm])
    return np.array([[float(x) for x in v] for v in getattr(vectors, "_value", vectors)]), np.asarray(rotation)


class SE3Calculator(Calculator):
    """ASE calculator of an exported model; energies in eV relative to isolated atoms, forces in eV/Angstrom, stress in eV/Angstrom^3.

    The stress, of periodic structures with conservative forces, is the derivative of the energy with respect to a homogeneous strain of
    atoms and cell, over the volume: what ASE's cell filters and barostats relax. It comes from the same evaluation as the forces.

    Parameters
    ----------
    model : str or Path
        Name of a released model, or path.
    forces : str
        ``"conservative"`` (default here, since optimisers and vibrations need forces that belong to the energy) or ``"direct"``.
    device : str or None
        Torch device; the CPU by default.
    precision : str
        ``"double"`` (default) or ``"single"``.

    Raises
    ------
    ModelFileError, ValueError
        As `SE3Potential`.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces", "stress"]

    def __init__(
        self, model: str | Path = "se3-ani1x", forces: str = "conservative", device: str | None = None, precision: str = "double", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if forces in MULTIPLE_TIME_STEPS:
            raise ValueError(f"forces={forces!r} is for OpenMM's multiple-time-step integrators; in ASE its sum is forces='conservative'")
        potential = SE3Potential(model, forces=forces, device=device, precision=precision)
        self.metadata = potential.metadata
        self._direct = forces == "direct"
        self._device = torch.device(device or "cpu")
        self._model = potential._model.to(self._device)

    def calculate(self, atoms: Atoms | None = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        """Called by ASE.

        Raises
        ------
        UnsupportedSystemError
            For unknown elements, non-finite positions, partial periodicity or a box that is too small.
        PropertyNotImplementedError
            If the stress is asked for without a periodic cell, or with direct forces.
        """
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        if "stress" in properties and self._direct:
            raise PropertyNotImplementedError("stress is a derivative of the energy, which direct forces are not; use forces='conservative'")
        if "stress" in properties and not atoms.pbc.any():
            raise PropertyNotImplementedError("stress needs a periodic cell; set atoms.cell and atoms.pbc = True")
        unknown = sorted(set(atoms.get_chemical_symbols()) - set(self.metadata.elements))
        if unknown:
            known = ", ".join(self.metadata.elements)
            raise UnsupportedSystemError(f"model {self.metadata.name!r} was not trained on {', '.join(unknown)}; it knows {known}")
        if not np.isfinite(atoms.positions).all():
            raise UnsupportedSystemError("positions hold NaN or infinite coordinates")
        if atoms.pbc.any() and not atoms.pbc.all():
            raise UnsupportedSystemError(f"pbc is {atoms.pbc.tolist()}; the model handles all directions periodic or none")
        box, rotation = None, np.eye(3)
        if atoms.pbc.all():
            vectors, rotation = reduced_cell(atoms)
            check_box(vectors, self.metadata)
            box = torch.tensor(vectors, dtype=torch.float64, device=self._device)
        positions = torch.tensor(atoms.positions @ rotation.T * (units.Ang / units.nm), dtype=torch.float64, device=self._device)
        numbers = torch.tensor(atoms.numbers, dtype=torch.int64, device=self._device)
        derivatives: dict[str, np.ndarray] = {}
        if self._direct:
            energy, forces = self._model(positions, numbers, box)
        elif box is None:
            positions.requires_grad_(True)
            energy = self._model.energy(positions, numbers, None)
            forces = -torch.autograd.grad([energy], [positions])[0]
        else:
            positions.requires_grad_(True)
            strain = torch.zeros(3, 3, dtype=torch.float64, device=self._device, requires_grad=True)
            deformation = torch.eye(3, dtype=torch.float64, device=self._device) + strain
            energy = self._model.energy(positions @ deformation, numbers, box @ deformation)
            gradient, virial = torch.autograd.grad([energy], [positions, strain])
            forces = -gradient
            stress = rotation.T @ virial.cpu().numpy() @ rotation * (_KJ_PER_MOL / atoms.get_volume())
            derivatives["stress"] = full_3x3_to_voigt_6_stress(stress)
        value = float(energy.detach()) * _KJ_PER_MOL
        rotated = forces.detach().cpu().numpy() @ rotation * (_KJ_PER_MOL / units.nm)
        self.results = {"energy": value, "free_energy": value, "forces": rotated, **derivatives}
