"""Equations 2.6 and 2.7: attentive self-interaction."""

import math

import torch
from torch import Tensor, nn


class ReferenceSelfInteraction(nn.Module):
    """Mix the channels of each degree by a matrix that a network makes of the atom's own invariants.

    Parameters
    ----------
    channels_in, channels_out : tuple of int
        Channels per degree; degrees that only one side has are dropped.
    hidden : int
        Width of the networks.
    """

    def __init__(self, channels_in: tuple[int, ...], channels_out: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        pairs = list(zip(channels_in, channels_out, strict=False))
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(c_in * c_in, hidden), nn.SiLU(), nn.Linear(hidden, c_in * c_out)) for c_in, c_out in pairs
        )
        self.channels_out = [c_out for _, c_out in pairs]
        self.scales = [1.0 / math.sqrt(c_in) for c_in, _ in pairs]

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Features ``[(n_atoms, 2*l + 1, channels_in[l])]`` to ``[(n_atoms, 2*l + 1, channels_out[l])]``."""
        out: list[Tensor] = []
        for degree, network in enumerate(self.networks):
            f = features[degree]
            # Equation 2.7: w_i = MLP(f_ic . f_ic' for all c, c'); the mean over components stands for their sum.
            products = torch.matmul(f.transpose(1, 2), f) / f.shape[1]
            weights = network(products.flatten(1)).view(f.shape[0], f.shape[2], self.channels_out[degree])
            # Equation 2.6: f_out_ic' = sum_c w_ic'c f_ic
            out.append(torch.matmul(f, weights) * self.scales[degree])
        return out
