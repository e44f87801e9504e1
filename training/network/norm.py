"""Equivariant normalisation."""

import torch
from torch import Tensor, nn


class EquivariantRMSNorm(nn.Module):
    """Divide all degrees of an atom by one joint root-mean-square, then scale each channel.

    The thesis' ReLU(LayerNorm(|f|)) f/|f| (equation 2.9) has a finite output where f vanishes, hence an undefined direction
    and an unbounded gradient there. One statistic over all degrees, with no shift, keeps f -> 0 exactly linear: an atom at a
    symmetric site, whose vectors vanish, is divided by the size of its scalars.

    Parameters
    ----------
    channels : sequence of int
        Channels per degree.
    epsilon : float
        Added to the mean square.
    """

    def __init__(self, channels: tuple[int, ...], epsilon: float = 1e-3) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.gains = nn.ParameterList([nn.Parameter(torch.ones(c)) for c in channels])

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Features ``[(n_atoms, 2*l + 1, channels[l])]`` in and out."""
        total = features[0].square().mean([1, 2], keepdim=True)
        for f in features[1:]:
            total = total + f.square().mean([1, 2], keepdim=True)
        scale = torch.rsqrt(total / len(features) + self.epsilon)
        out: list[Tensor] = []
        for degree, gain in enumerate(self.gains):
            out.append(features[degree] * scale * gain)
        return out
