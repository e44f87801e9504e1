"""`SE3Calculator`: the model as a calculator of the Atomic Simulation Environment (ASE)."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from openmm_se3.binding import MULTIPLE_TIME_STEPS
from openmm_se3.checks import check_box, check_neutral
from openmm_se3.errors import UnsupportedSystemError
from openmm_se3.model_file import module_from_bytes, module_to_bytes
from openmm_se3.potential import SE3Potential
from openmm_se3.structures import reduced_cell

_KJ_PER_MOL = units.kJ / units.mol


class SE3Calculator(Calculator):
    """ASE calculator of an exported model; energies in eV relative to self-energies, forces in eV/Angstrom, stress in eV/Angstrom^3.

    The stress, of periodic structures with conservative forces, is the derivative of the energy with respect to a homogeneous strain of
    atoms and cell, over the volume: what ASE's cell filters and barostats relax. From when it is first asked for, it comes from the same
    evaluation as the forces, one that takes longer.

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
    atoms : ase.Atoms, optional
        To be given this calculator.
    label : str, optional
        As of every calculator of ASE; nothing is written.
    directory : str or Path
        As of every calculator of ASE; nothing is written.

    Raises
    ------
    ModelFileError, ValueError
        As `SE3Potential`; and for `forces` of multiple time steps.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces", "stress"]

    def __init__(
        self,
        model: str | Path = "se3-ani1x",
        forces: str = "conservative",
        device: str | None = None,
        precision: str = "double",
        atoms: Atoms | None = None,
        label: str | None = None,
        directory: str | Path = ".",
    ) -> None:
        if forces in MULTIPLE_TIME_STEPS:
            raise ValueError(f"forces={forces!r} is for OpenMM's multiple-time-step integrators; in ASE its sum is forces='conservative'")
        potential = SE3Potential(model, forces=forces, device=device, precision=precision)
        self.metadata = potential.metadata
        self._direct = forces == "direct"
        self._device = torch.device(device or "cpu")
        self._strained = False  # whether the stress was ever asked for
        self._model = potential.model.to(self._device)
        super().__init__(label=label, atoms=atoms, directory=directory)  # last, since it gives `atoms` this calculator

    def set(self, **kwargs: Any) -> dict[str, Any]:
        """Called by ASE, which would keep any parameter without using it.

        Raises
        ------
        TypeError
            If there are any: what the calculator computes is settled when it is made.
        """
        if kwargs:
            raise TypeError(f"SE3Calculator has no parameters to set, got {', '.join(kwargs)}; make a new one with other model, forces or precision")
        return super().set()

    def __getstate__(self) -> dict[str, Any]:
        """For `pickle`, which workers of `multiprocessing` need: the module as the bytes of its file."""
        return self.__dict__ | {"_model": module_to_bytes(self._model)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_model": module_from_bytes(state["_model"]).to(state["_device"])})

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """Called by ASE, which does not see that a charge was set since the last evaluation; errors as `calculate`."""
        if atoms is not None:
            check_neutral(atoms.info.get("charge"), atoms.info.get("multiplicity"))
        return super().get_property(name, atoms, allow_calculation)

    def calculate(self, atoms: Atoms | None = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        """Called by ASE.

        Raises
        ------
        UnsupportedSystemError
            Without atoms, for unknown elements, non-finite positions, charges, partial periodicity or a box that is too small.
        PropertyNotImplementedError
            If the stress is asked for without a periodic cell, or with direct forces.
        """
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        if "stress" in properties and self._direct:
            raise PropertyNotImplementedError("stress is a derivative of the energy, which direct forces are not; use forces='conservative'")
        if "stress" in properties and not atoms.pbc.any():
            raise PropertyNotImplementedError("stress needs a periodic cell; set atoms.cell and atoms.pbc = True")
        if not len(atoms):
            raise UnsupportedSystemError("no atoms; the model needs at least one")
        check_neutral(atoms.info.get("charge"), atoms.info.get("multiplicity"))
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
        # Who asks for the stress once asks at each step, and after the forces.
        self._strained = self._strained or "stress" in properties
        if self._direct:
            energy, forces = self._model(positions, numbers, box)
        elif (box is None or not self._strained) and hasattr(self._model, "conservative_and_direct"):  # as all but old files have
            energy, forces, _ = self._model.conservative_and_direct(positions, numbers, box)
        else:
            positions.requires_grad_(True)
            strain = torch.zeros(3, 3, dtype=torch.float64, device=self._device, requires_grad=True)
            deformation = torch.eye(3, dtype=torch.float64, device=self._device) + strain
            energy = self._model.energy(positions @ deformation, numbers, None if box is None else box @ deformation)
            gradient, virial = torch.autograd.grad([energy], [positions, strain])
            forces = -gradient
            if box is not None:
                stress = rotation.T @ virial.cpu().numpy() @ rotation * (_KJ_PER_MOL / atoms.get_volume())
                derivatives["stress"] = full_3x3_to_voigt_6_stress(stress)
        value = float(energy.detach()) * _KJ_PER_MOL
        rotated = forces.detach().cpu().numpy() @ rotation * (_KJ_PER_MOL / units.nm)
        self.results = {"energy": value, "free_energy": value, "forces": rotated, **derivatives}
