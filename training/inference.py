"""What an exported file holds of a network: a form that gives energies, direct forces, and the gradient of the energy."""

import torch
from torch import Tensor, nn

from training.fused import FusedTransformer
from training.network import SE3Transformer


class AutogradForm(nn.Module):
    """A network whose gradient autograd computes: what has no adjoint of its own.

    Parameters
    ----------
    network : nn.Module
        Called as `SE3Transformer.forward`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, species: Tensor, displacement: Tensor, neighbors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Arguments and results as in `SE3Transformer.forward`."""
        return self.network(species, displacement, neighbors, mask)

    @torch.jit.export
    def energy_and_gradient(self, species: Tensor, displacement: Tensor, neighbors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments and results as in `FusedTransformer.energy_and_gradient`; autograd must be enabled."""
        leaf = displacement.detach().clone().requires_grad_(True)
        energy, force = self.network(species, leaf, neighbors, mask)
        gradient = torch.autograd.grad([energy.sum()], [leaf])[0]
        assert gradient is not None  # TorchScript's type is Optional
        return energy.detach(), force.detach(), gradient


def inference_form(network: nn.Module) -> nn.Module:
    """The fused form of an `SE3Transformer`; any other network in `AutogradForm`, unless it gives the gradient itself."""
    if isinstance(network, SE3Transformer):
        return FusedTransformer(network)
    return network if hasattr(network, "energy_and_gradient") else AutogradForm(network)
