"""What one force of a System computes: the model bound to its atoms, in the parts that the force modes are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional  # TorchScript reads Optional, not "| None", in the signature of a scripted method.

import torch
from torch import Tensor, nn


class _Bound(nn.Module):
    """A model with the atoms of a System that it describes, as buffers, so that they follow it to the GPU.

    The forward methods call nothing but the model: torch 2.12 crashes the process when an error is raised through one more
    method of a frozen module, in place of handing the error on.
    """

    atomic_numbers: Tensor
    atoms: Tensor

    def __init__(self, model: torch.jit.ScriptModule, atomic_numbers: Tensor, atoms: Tensor, all_atoms: bool, without_energy: bool) -> None:
        super().__init__()
        self.model = model
        self.without_energy = without_energy
        self.all_atoms = all_atoms
        self.register_buffer("atomic_numbers", atomic_numbers)
        self.register_buffer("atoms", atoms)


class _Direct(_Bound):
    """Energy and direct forces of all particles; those outside the model get none."""

    def forward(self, positions: Tensor, box_vectors: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:  # noqa: UP045
        with torch.no_grad():
            x = positions.detach()
            if self.all_atoms:
                energy, forces = self.model(x, self.atomic_numbers, box_vectors)
            else:
                atoms = self.atoms.to(x.device)
                energy, selected = self.model(x.index_select(0, atoms), self.atomic_numbers, box_vectors)
                forces = torch.zeros_like(x).index_copy(0, atoms, selected)
            if self.without_energy:
                energy = torch.zeros_like(energy)
            # TorchForce reads a raw pointer: dtype, device and layout must be those of the positions.
            return energy, forces.to(x).contiguous()


class _Conservative(_Bound):
    """Energy of the model's atoms, to be differentiated."""

    def forward(self, positions: Tensor, box_vectors: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        x = positions if self.all_atoms else positions.index_select(0, self.atoms.to(positions.device))
        return self.model.energy(x, self.atomic_numbers, box_vectors)


class _Correction(_Bound):
    """Energy of the model's atoms, whose gradient lacks the direct forces: what is left are the conservative forces minus those."""

    def forward(self, positions: Tensor, box_vectors: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        x = positions if self.all_atoms else positions.index_select(0, self.atoms.to(positions.device))
        energy, direct = self.model.energy_and_forces(x, self.atomic_numbers, box_vectors)
        with torch.no_grad():
            # A copy, since freezing, which TorchForce does, drops detach() and with it the gradient of the difference below.
            here = x.clone()
        # The added term is zero; its gradient is the direct forces.
        return energy + ((x - here) * direct).sum()


class _Scaled(nn.Module):
    """A bound model times global parameters, which TorchForce hands over after the box, or instead of it where there is none."""

    def __init__(self, bound: nn.Module, periodic: bool) -> None:
        super().__init__()
        self.bound = bound
        self.periodic = periodic

    def _box_and_scale(self, a: Tensor, b: Optional[Tensor], c: Optional[Tensor]) -> tuple[Optional[Tensor], Tensor]:  # noqa: UP045
        scale = torch.ones([], dtype=torch.float64, device=a.device)
        if not self.periodic:
            scale = scale * a.reshape([])
        if b is not None:
            scale = scale * b.reshape([])
        if c is not None:
            scale = scale * c.reshape([])
        return a if self.periodic else None, scale


class _ScaledForces(_Scaled):
    def forward(self, positions: Tensor, a: Tensor, b: Optional[Tensor] = None, c: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:  # noqa: UP045
        box, scale = self._box_and_scale(a, b, c)
        energy, forces = self.bound(positions, box)
        return energy * scale, (forces * scale.detach().to(forces)).contiguous()


class _ScaledEnergy(_Scaled):
    def forward(self, positions: Tensor, a: Tensor, b: Optional[Tensor] = None, c: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        box, scale = self._box_and_scale(a, b, c)
        return self.bound(positions, box) * scale


@dataclass(frozen=True)
class Term:
    """One of the forces that a force mode is made of.

    Attributes
    ----------
    name : str
        For the name of the OpenMM Force.
    outputs_forces : bool
        Whether it returns forces; else its energy is to be differentiated.
    group_offset : int
        Added to the force group that the user asked for.
    carries_energy : bool
        Whether its energy is that of the model, not zero.
    """

    name: str
    outputs_forces: bool
    group_offset: int
    carries_energy: bool


_DIRECT = Term("direct", True, 0, True)
_CONSERVATIVE = Term("conservative", False, 0, True)
_INNER = Term("mts, direct", True, 0, False)
_CORRECTION = Term("mts, conservative - direct", False, 1, True)
_MODULES: dict[Term, type[_Bound]] = {_DIRECT: _Direct, _CONSERVATIVE: _Conservative, _INNER: _Direct, _CORRECTION: _Correction}

#: The forces of each mode. Those of ``"mts"`` sum to the conservative model.
TERMS: dict[str, tuple[Term, ...]] = {"direct": (_DIRECT,), "conservative": (_CONSERVATIVE,), "mts": (_INNER, _CORRECTION)}
FORCE_MODES = tuple(TERMS)


def bind(model: torch.jit.ScriptModule, term: Term, atomic_numbers: Sequence[int], atoms: Sequence[int], n_particles: int) -> nn.Module:
    """Make the module that one force evaluates.

    Parameters
    ----------
    model : ScriptModule
        What `load_model` returns.
    term : Term
        Which force.
    atomic_numbers, atoms : sequence of int
        Elements, and indices among all particles.
    n_particles : int
        Particles whose positions the module is given.

    Returns
    -------
    torch.nn.Module
        Called with positions ``(n_particles, 3)`` nm and the box ``(3, 3)`` nm or None; returns the energy () kJ/mol, and where
        the term outputs them forces ``(n_particles, 3)`` kJ/mol/nm.
    """
    everything = list(atoms) == list(range(n_particles))
    return _MODULES[term](model, torch.tensor(list(atomic_numbers)), torch.tensor(list(atoms)), everything, not term.carries_energy).eval()


def scale(bound: nn.Module, term: Term, periodic: bool) -> nn.Module:
    """Let a module from `bind` be multiplied by one or two parameters.

    Parameters
    ----------
    bound : torch.nn.Module
        From `bind`.
    term : Term
        The same as there.
    periodic : bool
        Whether it is called with a box.

    Returns
    -------
    torch.nn.Module
        Called with positions, then, if `periodic`, the box, then the parameters, each one number.
    """
    return (_ScaledForces if term.outputs_forces else _ScaledEnergy)(bound, periodic).eval()
