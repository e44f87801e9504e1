"""Equation 2.9: the norm non-linearity."""

import torch
from torch import Tensor, nn


class NormNonlinearity(nn.Module):
    """Equation 2.9: ReLU(LayerNorm(|f|)) f / |f|, the norm over components, LayerNorm over the channels of a degree.

    Two guards keep every derivative finite. |f| is sqrt(|f|^2 + epsilon^2) here: f / |f| has no limit where f vanishes, as vectors do at every
    symmetric site. And the variance in LayerNorm gets `variance_epsilon`, far above torch's 1e-5: two channels of nearly equal norm would
    otherwise swap their normalised values, +1 and -1, within a change of 0.3%.

    Parameters
    ----------
    channels : tuple of int
        Channels per degree.
    epsilon, variance_epsilon : float
        The guards.
    """

    def __init__(self, channels: tuple[int, ...], epsilon: float = 1e-1, variance_epsilon: float = 1e-2) -> None:
        super().__init__()
        self.squared_epsilon = epsilon * epsilon
        norms = []
        for c in channels:
            norm = nn.LayerNorm(c, eps=variance_epsilon)
            # Normalised values have mean 0: without a shift ReLU would silence half of the channels, with two channels always one.
            nn.init.ones_(norm.bias)
            norms.append(norm)
        self.norms = nn.ModuleList(norms)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Features ``[(n_atoms, 2*l + 1, channels[l])]`` in and out."""
        out: list[Tensor] = []
        for degree, norm in enumerate(self.norms):
            f = features[degree]
            size = torch.sqrt(f.square().sum(1, keepdim=True) + self.squared_epsilon)
            out.append(torch.relu(norm(size)) * f / size)  # equation 2.9
        return out
