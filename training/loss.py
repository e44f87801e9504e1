"""The loss of equation 3.2 and the errors that are reported."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from training.config import LossConfig
from training.data.batches import Batch


def molecule_energies(atomic_energies: Tensor, batch: Batch) -> Tensor:
    """Sum energies per atom ``(n_atoms,)`` over each molecule, in float64: ``(n_molecules,)``."""
    total = torch.zeros(len(batch.n_atoms_of), dtype=torch.float64, device=atomic_energies.device)
    return total.index_add(0, batch.molecule, atomic_energies.to(torch.float64))


def predict(network: nn.Module, batch: Batch, conservative: bool, create_graph: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Energies, direct forces and, on demand, minus the gradient of the energy.

    Parameters
    ----------
    network : Module
        `SE3Transformer`.
    batch : Batch
        Molecules.
    conservative : bool
        Whether to differentiate the energy.
    create_graph : bool
        Whether the gradient will itself be differentiated (training).

    Returns
    -------
    tuple
        ``(n_molecules,)`` eV float64, ``(n_atoms, 3)`` eV/Angstrom, and the same or None.
    """
    positions = batch.positions.detach().requires_grad_(conservative)
    with torch.set_grad_enabled(conservative or torch.is_grad_enabled()):
        atomic_energies, direct = network(batch.species, batch.displacement(positions), batch.neighbors, batch.mask)
        energies = molecule_energies(atomic_energies, batch)
        gradient_forces = None
        if conservative:
            (gradient,) = torch.autograd.grad(energies.sum(), positions, create_graph=create_graph, retain_graph=create_graph)
            gradient_forces = -gradient
    return energies, direct, gradient_forces


def huber(square: Tensor, threshold: float | None) -> Tensor:
    """Square of an error up to `threshold`, beyond it 2 t |x| - t^2: the slope stays at 2 t (Huber, Ann. Math. Stat. 35, 73 (1964)).

    Parameters
    ----------
    square : Tensor
        x^2. The square, because the slope of a norm is not defined where an error vanishes.
    threshold : float or None
        t; None for the square everywhere.
    """
    if threshold is None:
        return square
    t2 = threshold * threshold
    return torch.where(square <= t2, square, 2.0 * threshold * square.clamp_min(t2).sqrt() - t2)


class EnergyForceLoss(nn.Module):
    """w_E <(dE)^2 / (n s_E^2)> + w_F <(dF)^2 / s_F^2>, and the same for the conservative forces.

    Each term is divided by the spread of its labels (s_E of the energy per square root of an atom, s_F of a force component),
    so that the weights compare pure numbers; errors of independent atoms add up in quadrature, hence the n.

    With ``energy_huber`` the energy of a molecule, and with ``force_huber`` the force on an atom, counts by the Huber function of its error
    instead. It takes the length of an atom's force error, not its components one by one: that would depend on how the molecule is turned.

    Parameters
    ----------
    config : LossConfig
        The weights.
    energy_scale, force_scale : float
        s_E, eV, and s_F, eV/Angstrom.
    """

    def __init__(self, config: LossConfig, energy_scale: float, force_scale: float) -> None:
        super().__init__()
        self.config = config
        self.energy_scale, self.force_scale = energy_scale, force_scale

    def per_molecule(self, energies: Tensor, direct: Tensor, conservative: Tensor | None, batch: Batch, whole: Tensor | None = None) -> Tensor:
        """Every molecule's share, ``(n_molecules,)``; their mean weighs each atom's force alike within the batch.

        `whole`, the numbers of molecules and of atoms ``(2,)`` of a batch of which this is a part, makes the mean a summand: the sum
        over the parts is the loss of the whole batch.
        """
        relative = ((energies - batch.energies) / self.energy_scale).square() / batch.n_atoms_of
        loss = self.config.energy_weight * huber(relative, self.config.energy_huber)
        if batch.forces is not None:
            atoms_per_molecule = len(batch.species) / len(batch.n_atoms_of) if whole is None else (whole[1] / whole[0]).to(loss.dtype)
            for weight, forces in ((self.config.force_weight, direct), (self.config.conservative_weight, conservative)):
                if weight and forces is not None:
                    per_atom = huber(((forces - batch.forces) / self.force_scale).square().mean(-1), self.config.force_huber)
                    loss = loss + weight / atoms_per_molecule * torch.zeros_like(loss).index_add(0, batch.molecule, per_atom.to(loss.dtype))
        return loss if whole is None else loss * (len(loss) / whole[0]).to(loss.dtype)


class ErrorSums:
    """Running sums behind MAE and RMSE of energies (per molecule and per atom) and of force components."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, errors: Tensor) -> None:
        """Add `errors` of any shape under `name`."""
        e = errors.detach().to(torch.float64)
        self.add_sums(name, e.numel(), float(e.abs().sum()), float(e.square().sum()))

    def add_sums(self, name: str, count: float, absolute: float, square: float) -> None:
        """Add errors of which only their number, the sum of their sizes and that of their squares are known."""
        total = self.sums.setdefault(name, [0.0, 0.0, 0.0])
        for i, value in enumerate((count, absolute, square)):
            total[i] += value

    def add_batch(self, energies: Tensor, direct: Tensor, conservative: Tensor | None, batch: Batch) -> None:
        """Add the errors of one batch."""
        difference = energies - batch.energies
        self.add("energy", difference)
        self.add("energy_per_atom", difference / batch.n_atoms_of)
        if batch.forces is not None:
            self.add("force", direct - batch.forces)
            if conservative is not None:
                self.add("conservative_force", conservative - batch.forces)

    def add_all(self, others: Iterable["ErrorSums"]) -> None:
        """Add what others have summed."""
        for other in others:
            for name, sums in other.sums.items():
                self.add_sums(name, *sums)

    def result(self) -> dict[str, float]:
        """``{name}_mae`` and ``{name}_rmse`` in eV and eV/Angstrom."""
        out = {}
        for name, (n, absolute, square) in self.sums.items():
            out[f"{name}_mae"] = absolute / n
            out[f"{name}_rmse"] = (square / n) ** 0.5
        return out
