"""Train the gradient of the energy without differentiating twice.

The gradient of a force-matching loss L(F), F = -dE/dx, with respect to the weights is

    dL/dw = sum_i (dL/dF_i) . (dF_i/dw) = -d/dw [ g . dE/dx ],   g = dL/dF held fixed,

a directional derivative of dE/dw along g. A short step along g gives it from first derivatives alone:

    -d/dw [ E(x + h g) - E(x) ] / h,

exact to first order in h. Each molecule has its own h, such that its atom with the largest g moves by `STEP`. Three evaluations of
the network and ordinary backward passes take the place of a backward pass through a backward pass, which costs more memory and
cannot be compiled (`python -m benchmarks force-matching` prints the ratio). The forces come from an evaluation of their own, whose backward
pass leaves the weights out: no graph is walked back twice, which `torch.compile` would refuse.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from training.data.batches import Batch
from training.loss import EnergyForceLoss, molecule_energies

# Angstrom. Against differentiating twice, on a trained network, the gradient was 29% off at 1e-2, 3% at 1e-3 and 1% at 3e-4, the same in
# float32 as in float64; random weights, at 0.2% for 1e-2, show nothing of this.
STEP = 5e-4


def positions_only(network: nn.Module) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Energies per atom by the network's current weights, of which nothing but the positions will be differentiated."""

    def atomic_energies(species: Tensor, displacement: Tensor, neighbors: Tensor, mask: Tensor) -> Tensor:
        weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
        energies: Tensor = functional_call(network, weights, (species, displacement, neighbors, mask))[0]
        return energies

    return atomic_energies


def backward_force_matching(
    network: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    atomic_energies: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    batch: Batch,
    loss: EnergyForceLoss,
    whole: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Accumulate the gradient of the whole loss, conservative term included, in the parameters.

    Parameters
    ----------
    network : callable
        `SE3Transformer`, compiled or not.
    atomic_energies : callable
        `positions_only` of the same network, compiled or not.
    batch : Batch
        With forces.
    loss : EnergyForceLoss
        Its conservative weight must not be zero.
    whole : Tensor, optional
        As in `EnergyForceLoss.per_molecule`.

    Returns
    -------
    tuple of Tensor
        Loss of each molecule ``(n_molecules,)``, energies, direct forces and conservative forces, all detached.
    """
    positions = batch.positions.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(atomic_energies(batch.species, batch.displacement(positions), batch.neighbors, batch.mask).sum(), positions)
    conservative = (-gradient).requires_grad_(True)
    at_rest, direct = network(batch.species, batch.displacement(batch.positions), batch.neighbors, batch.mask)
    energies = molecule_energies(at_rest, batch)

    per_molecule = loss.per_molecule(energies, direct, conservative, batch, whole)
    (g,) = torch.autograd.grad(per_molecule.mean(), conservative, retain_graph=True)
    largest = torch.zeros(len(batch.n_atoms_of), dtype=g.dtype, device=g.device)
    largest = largest.scatter_reduce(0, batch.molecule, g.norm(dim=-1), "amax").clamp_min(1e-20)
    h = STEP / largest
    inverse_h = (1.0 / h)[batch.molecule]
    # dL/dw through energies and direct forces, plus the E(x) half of the difference, in one backward pass ...
    (per_molecule.mean() + (at_rest * inverse_h).sum()).backward()
    # ... and the E(x + h g) half.
    with torch.no_grad():
        displaced = batch.positions + h[batch.molecule].unsqueeze(-1) * g
    moved, _ = network(batch.species, batch.displacement(displaced), batch.neighbors, batch.mask)
    (-(moved * inverse_h).sum()).backward()
    return per_molecule.detach(), energies.detach(), direct.detach(), conservative.detach()
