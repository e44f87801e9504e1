"""Attentive self-interaction: equations 2.6 and 2.7 at low rank."""

import torch
from torch import Tensor, nn

from training.network.linear import EquivariantLinear, invariant_products


class AttentiveSelfInteraction(nn.Module):
    """Mix the channels of each degree with weights that depend on the atom's own invariants.

    The thesis feeds all products f_c . f_c' of one degree through a network that emits a full mixing matrix. Here two learned
    maps choose which products to form, and the network emits one gate per output channel of a learned mixing: the same
    function at rank one per channel, with cost linear in the number of products.

    Parameters
    ----------
    channels : tuple of int
        Channels per degree, in and out.
    n_products : int
        Products formed per degree.
    hidden : int
        Width of the network.
    """

    def __init__(self, channels: tuple[int, ...], n_products: int, hidden: int) -> None:
        super().__init__()
        self.sections = [channels[0], *channels]
        projected = (n_products,) * len(channels)
        self.left = EquivariantLinear(channels, projected, bias=False)
        self.right = EquivariantLinear(channels, projected, bias=False)
        self.mix = EquivariantLinear(channels, channels, bias=False)
        self.network = nn.Sequential(
            nn.Linear(channels[0] + n_products * len(channels), hidden), nn.SiLU(), nn.Linear(hidden, sum(channels) + channels[0])
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Features ``[(n_atoms, 2*l + 1, channels[l])]`` in and out."""
        products = invariant_products(self.left(features), self.right(features))
        weights = self.network(torch.cat([features[0].squeeze(1), products], dim=-1)).unsqueeze(1)
        parts = weights.split(self.sections, dim=-1)
        mixed = self.mix(features)
        # Degree 0 may also take a term that no product with itself can give: the network's own scalar, parts[0].
        out = [parts[1] * mixed[0] + parts[0]]
        for degree in range(1, len(mixed)):
            out.append(parts[degree + 1] * mixed[degree])
        return out
