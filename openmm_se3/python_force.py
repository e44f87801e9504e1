"""The model as an `openmm.PythonForce`, for installations whose openmm-torch is missing or does not fit; the same numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit

from openmm_se3.binding import Term, bind
from openmm_se3.model_file import module_from_bytes, module_to_bytes


@dataclass
class Computation:
    """What OpenMM calls at each evaluation; pickled into a System's XML with all it needs, except this package.

    Attributes
    ----------
    archive : bytes
        The TorchScript module in the precision of the System.
    term : Term
        Which of its forces.
    atomic_numbers : list of int
        Elements, in the order of the force's particles.
    scale_parameters : list of str
        Global parameters that multiply energy and forces.
    periodic : bool
        Whether the model is given the box.
    device : str or None
        Torch device; None for a GPU where torch sees one, else the CPU.
    chosen : list of int or None
        Those of the particles of the State that the model describes, where OpenMM (8.5) cannot choose them; None for all.
    inner_steps : int or None
        As of `SE3Potential`.
    """

    archive: bytes
    term: Term
    atomic_numbers: list[int]
    scale_parameters: list[str]
    periodic: bool
    device: str | None
    chosen: list[int] | None = None
    inner_steps: int | None = None
    _bound: torch.nn.Module | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Without the opened module, which opens again from the archive."""
        return {**self.__dict__, "_bound": None}

    def __call__(self, state: openmm.State) -> tuple[float, Any]:
        """Energy (kJ/mol) and forces ``(n_atoms, 3)`` (kJ/mol/nm) at the positions of a State."""
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self._bound is None:
            n = len(self.atomic_numbers)
            module = module_from_bytes(self.archive)
            self._bound = bind(module, self.term, self.atomic_numbers, range(n), n, self.inner_steps).to(device)
        positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        x = torch.tensor(positions if self.chosen is None else positions[self.chosen], dtype=torch.float64, device=device)
        box = None
        if self.periodic:
            box = torch.tensor(state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(unit.nanometer), dtype=torch.float64, device=device)
        energy, forces = self._bound(x, box)
        scale = 1.0
        for name in self.scale_parameters:
            scale *= state.getParameters()[name]
        result = scale * forces.cpu().numpy()
        if self.chosen is not None:
            result, some = np.zeros_like(positions), result
            result[self.chosen] = some
        return scale * float(energy), result


def create_python_force(
    model: torch.jit.ScriptModule,
    term: Term,
    atomic_numbers: Sequence[int],
    atoms: Sequence[int],
    periodic: bool,
    scale_parameters: Mapping[str, bool],
    device: str | None,
    inner_steps: int | None = None,
) -> openmm.Force:
    """Make the force; parameters as `openmm_se3.force.create_forces`.

    Returns
    -------
    openmm.PythonForce or openmm.CustomCVForce
        The second where a derivative of the energy by a parameter is wanted, which a PythonForce does not offer: it has the first within.
    """
    inside = term.carries_energy and any(scale_parameters.values())
    chooses = hasattr(openmm.PythonForce, "setParticles")  # since OpenMM 8.6
    computation = Computation(
        archive=module_to_bytes(model),
        term=term,
        atomic_numbers=list(atomic_numbers),
        scale_parameters=[] if inside else list(scale_parameters),
        periodic=periodic,
        device=device,
        chosen=None if chooses else list(atoms),
        inner_steps=inner_steps,
    )
    force = openmm.PythonForce(computation, dict.fromkeys(computation.scale_parameters, 1.0))
    if chooses:
        force.setParticles(list(atoms))
    force.setUsesPeriodicBoundaryConditions(periodic)
    return _scaled(force, scale_parameters) if inside else force


def _scaled(force: openmm.Force, scale_parameters: Mapping[str, bool]) -> openmm.CustomCVForce:
    """The force times global parameters, those of them that say so with the derivative of the energy."""
    scaled = openmm.CustomCVForce("*".join([*scale_parameters, "unscaled_model"]))
    scaled.addCollectiveVariable("unscaled_model", force)
    for name, derivative in scale_parameters.items():
        scaled.addGlobalParameter(name, 1.0)
        if derivative:
            scaled.addEnergyParameterDerivative(name)
    return scaled
