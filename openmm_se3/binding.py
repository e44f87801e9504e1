"""What one force of a System computes: the model bound to its atoms, in the parts that the force modes are made of.

    mode            terms, one force each       group    energy
    direct          direct                      g        the model's
    conservative    conservative                g        the model's
    mts             direct                      g        0
                    conservative - direct       g + 1    the model's
    mts-fast        fast                        g        the fast network's
                    conservative - fast         g + 1    the model's less the fast network's

g is the group that the user asked for, `forceGroup`. With `inner_steps` of n the first of two terms is 1 - 1/n of what it says, and the second has
the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional  # TorchScript reads Optional, not "| None", in the signature of a scripted method.

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Term:
    """One of the forces that a force mode is made of.

    Attributes
    ----------
    name : str
        For the name of the OpenMM Force.
    group_offset : int
        Added to the force group that the user asked for.
    carries_energy : bool
        Whether it has an energy, not zero.
    """

    name: str
    group_offset: int
    carries_energy: bool


_DIRECT = Term("direct", 0, True)
_CONSERVATIVE = Term("conservative", 0, True)
_INNER = Term("mts, direct", 0, False)
_CORRECTION = Term("mts, conservative - direct", 1, True)
_FAST = Term("mts-fast, fast", 0, True)
_SLOW = Term("mts-fast, conservative - fast", 1, True)

#: The forces of each mode. Those of ``"mts"`` and ``"mts-fast"`` sum to the conservative model.
TERMS: dict[str, tuple[Term, ...]] = {
    "direct": (_DIRECT,),
    "conservative": (_CONSERVATIVE,),
    "mts": (_INNER, _CORRECTION),
    "mts-fast": (_FAST, _SLOW),
}
FORCE_MODES = tuple(TERMS)
#: Those with two force groups, for `MultipleTimeStepIntegrator`.
MULTIPLE_TIME_STEPS = ("mts", "mts-fast")
#: Which of a model's forces each mode is made of.
FORCES_OF_MODE = {"direct": {"direct"}, "conservative": {"conservative"}, "mts": {"direct", "conservative"}, "mts-fast": {"conservative", "fast"}}


class _Bound(nn.Module):
    """A model with the atoms of a System that it describes, as buffers, so that they follow it to the GPU.

    The forward methods call the model themselves: torch 2.12 crashes the process when an error is raised through one more method of a
    frozen module, in place of handing the error on. The gradient of the positions, which OpenMM's CPU kernels ask for always, is not used.

    Of two forces for multiple time steps, the inner one is `part` of the fast force, and the other what that lacks of the conservative one.
    """

    atomic_numbers: Tensor
    atoms: Tensor

    def __init__(
        self, model: torch.jit.ScriptModule, atomic_numbers: Tensor, atoms: Tensor, all_atoms: bool, without_energy: bool, part: float
    ) -> None:
        super().__init__()
        self.model = model
        self.part = part
        self.without_energy = without_energy
        self.all_atoms = all_atoms
        self.register_buffer("atomic_numbers", atomic_numbers)
        self.register_buffer("atoms", atoms)

    def _select(self, positions: Tensor) -> Tensor:
        """Positions of the model's atoms, a copy: freezing, which TorchForce does, drops detach(), and with it the end of a record."""
        return positions.clone() if self.all_atoms else positions.index_select(0, self.atoms.to(positions.device))

    def _spread(self, forces: Tensor, positions: Tensor) -> Tensor:
        """Forces on all particles; those outside the model get none."""
        if not self.all_atoms:
            forces = torch.zeros_like(positions).index_copy(0, self.atoms.to(positions.device), forces.to(positions))
        # TorchForce reads a raw pointer: dtype, device and layout must be those of the positions.
        return forces.to(positions).contiguous()


class _Direct(_Bound):
    """Energy and direct forces."""

    def forward(self, positions: Tensor, box_vectors: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:  # noqa: UP045
        with torch.no_grad():
            energy, forces = self.model(self._select(positions), self.atomic_numbers, box_vectors)
            if self.without_energy:
                energy = torch.zeros_like(energy)
            if self.part < 1.0:
                forces = forces * self.part
            return energy, self._spread(forces, positions)


class _Conservative(_Bound):
    """Energy and conservative forces."""

    def forward(self, positions: Tensor, box_vectors: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:  # noqa: UP045
        with torch.no_grad():
            x = self._select(positions)
        energy, forces, _ = self.model.conservative_and_direct(x, self.atomic_numbers, box_vectors)
        with torch.no_grad():
            return energy, self._spread(forces, positions)


class _Correction(_Bound):
    """Energy, and what the direct forces lack of the conservative ones."""

    def forward(self, positions: Tensor, box_vectors: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:  # noqa: UP045
        with torch.no_grad():
            x = self._select(positions)
        energy, forces, direct = self.model.conservative_and_direct(x, self.atomic_numbers, box_vectors)
        with torch.no_grad():
            return energy, self._spread(torch.sub(forces, direct, alpha=self.part), positions)


class _Fast(_Bound):
    """Energy and conservative forces of the model's fast network."""

    def forward(self, positions: Tensor, box_vectors: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:  # noqa: UP045
        with torch.no_grad():
            x = self._select(positions)
        energy, forces = self.model.fast(x, self.atomic_numbers, box_vectors)
        with torch.no_grad():
            if self.part < 1.0:
                energy, forces = energy * self.part, forces * self.part
            return energy, self._spread(forces, positions)


class _Slow(_Bound):
    """What energy and conservative forces of the fast network lack of those of the model."""

    def forward(self, positions: Tensor, box_vectors: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:  # noqa: UP045
        with torch.no_grad():
            x = self._select(positions)
        energy, forces, _ = self.model.conservative_and_direct(x, self.atomic_numbers, box_vectors)
        fast_energy, fast_forces = self.model.fast(x, self.atomic_numbers, box_vectors)
        with torch.no_grad():
            energy = torch.sub(energy, fast_energy, alpha=self.part)
            return energy, self._spread(torch.sub(forces, fast_forces, alpha=self.part), positions)


class _AutogradConservative(_Bound):
    """`_Conservative` of a file that has no method for it, as those before the contract had one."""

    def forward(self, positions: Tensor, box_vectors: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:  # noqa: UP045
        with torch.no_grad():
            x = self._select(positions)
        x.requires_grad_(True)
        energy = self.model.energy(x, self.atomic_numbers, box_vectors)
        gradient = torch.autograd.grad([energy], [x])[0]
        assert gradient is not None  # TorchScript's type is Optional
        with torch.no_grad():
            return energy.clone(), self._spread(gradient.neg(), positions)  # a copy, for the reason in _select


class _AutogradCorrection(_Bound):
    """`_Correction` of such a file."""

    def forward(self, positions: Tensor, box_vectors: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:  # noqa: UP045
        with torch.no_grad():
            x = self._select(positions)
        x.requires_grad_(True)
        energy, direct = self.model.energy_and_forces(x, self.atomic_numbers, box_vectors)
        gradient = torch.autograd.grad([energy], [x])[0]
        assert gradient is not None
        with torch.no_grad():
            return energy.clone(), self._spread(torch.add(gradient, direct, alpha=self.part).neg(), positions)


class _Scaled(nn.Module):
    """A bound model times global parameters, which TorchForce hands over after the box, or instead of it where there is none."""

    def __init__(self, bound: nn.Module, periodic: bool) -> None:
        super().__init__()
        self.bound = bound
        self.periodic = periodic

    def forward(self, positions: Tensor, a: Tensor, b: Optional[Tensor] = None, c: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:  # noqa: UP045
        scale = torch.ones([], dtype=torch.float64, device=a.device)
        if not self.periodic:
            scale = scale * a.reshape([])
        if b is not None:
            scale = scale * b.reshape([])
        if c is not None:
            scale = scale * c.reshape([])
        energy, forces = self.bound(positions, a if self.periodic else None)
        return energy * scale, (forces * scale.detach().to(forces)).contiguous()


class _InPlace(nn.Module):
    """A bound module whose results are always in the same memory, that of the first ones.

    TorchForce (1.10) captures one CUDA graph for evaluations with forces and one for those without, which a reporter of energies asks for, but reads
    the results of both from wherever the one captured last left them: after the first report the forces of the other would never change again.
    """

    energy: Optional[Tensor]  # noqa: UP045
    forces: Optional[Tensor]  # noqa: UP045

    def __init__(self, bound: nn.Module) -> None:
        super().__init__()
        self.bound = bound
        # Made at the first call, and not buffers: two Contexts of a Force share its buffers, and would share the results.
        self.energy = None
        self.forces = None

    def forward(self, positions: Tensor, box_vectors: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:  # noqa: UP045
        new_energy, new_forces = self.bound(positions, box_vectors)
        energy, forces = self.energy, self.forces
        if energy is None or forces is None:
            energy, forces = torch.zeros_like(new_energy), torch.zeros_like(new_forces)
            self.energy, self.forces = energy, forces
        with torch.no_grad():
            return energy.copy_(new_energy), forces.copy_(new_forces)


_MODULES: dict[Term, type[_Bound]] = {
    _DIRECT: _Direct,
    _CONSERVATIVE: _Conservative,
    _INNER: _Direct,
    _CORRECTION: _Correction,
    _FAST: _Fast,
    _SLOW: _Slow,
}
_AUTOGRAD: dict[Term, type[_Bound]] = {_CONSERVATIVE: _AutogradConservative, _CORRECTION: _AutogradCorrection}


def modes_of(model: torch.jit.ScriptModule) -> tuple[str, ...]:
    """Force modes that a model has: those whose forces it was trained for, and ``"mts-fast"`` with a fast network only.

    Parameters
    ----------
    model : ScriptModule
        What `load_model` returns.

    Returns
    -------
    tuple of str
        Some of `FORCE_MODES`.
    """
    lacking = set(model.metadata.untrained) | (set() if hasattr(model, "fast") else {"fast"})
    return tuple(mode for mode, needed in FORCES_OF_MODE.items() if not lacking & needed)


def inner_part(inner_steps: int | None) -> float:
    """How much of the fast forces the first force holds if the second takes over those of one of so many inner steps.

    Parameters
    ----------
    inner_steps : int or None
        As of `SE3Potential`.

    Returns
    -------
    float
        1 - 1 / inner_steps; 1, which is all, with 1 or None.
    """
    return 1.0 if inner_steps is None or inner_steps == 1 else 1.0 - 1.0 / inner_steps


def bind(
    model: torch.jit.ScriptModule,
    term: Term,
    atomic_numbers: Sequence[int],
    atoms: Sequence[int],
    n_particles: int,
    inner_steps: int | None = None,
) -> nn.Module:
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
    inner_steps : int, optional
        As of `SE3Potential`, for multiple time steps.

    Returns
    -------
    torch.nn.Module
        Called with positions ``(n_particles, 3)`` nm and the box ``(3, 3)`` nm or None; returns the energy () kJ/mol and forces
        ``(n_particles, 3)`` kJ/mol/nm, without a record of gradients.
    """
    everything = list(atoms) == list(range(n_particles))
    module = _MODULES[term] if term not in _AUTOGRAD or hasattr(model, "conservative_and_direct") else _AUTOGRAD[term]
    indices, part = torch.tensor(list(atoms)), inner_part(inner_steps)
    return module(model, torch.tensor(list(atomic_numbers)), indices, everything, not term.carries_energy, part).eval()


def scale(bound: nn.Module, periodic: bool) -> nn.Module:
    """Let a module from `bind` be multiplied by one or two parameters.

    Parameters
    ----------
    bound : torch.nn.Module
        From `bind`.
    periodic : bool
        Whether it is called with a box.

    Returns
    -------
    torch.nn.Module
        Called with positions, then, if `periodic`, the box, then the parameters, each one number; the energy is differentiable in them.
    """
    return _Scaled(bound, periodic).eval()


def in_place(bound: nn.Module) -> nn.Module:
    """Let a module from `bind` leave its results always in the same memory, for CUDA graphs; it is called as before."""
    return _InPlace(bound).eval()
