"""Functions of the distance alone: the smooth cutoff envelope, the Bessel basis and the radial network psi."""

import math

import torch
from torch import Tensor, nn


def envelope(distance: Tensor, cutoff: float) -> Tensor:
    """Polynomial cutoff of Gasteiger et al. (2020), p = 6: 1 at zero, and 0 with two continuous derivatives at `cutoff`.

    Parameters
    ----------
    distance : Tensor
        Any shape, in the unit of `cutoff`.
    cutoff : float
        Where the function reaches zero.

    Returns
    -------
    Tensor
        Same shape; exactly 0 at and beyond the cutoff.
    """
    x = (distance / cutoff).clamp(max=1.0)
    cube = x * x * x  # for a power a processor takes far longer
    x6 = cube * cube
    return 1.0 + x6 * (-28.0 + x * (48.0 - 21.0 * x))


class BesselBasis(nn.Module):
    """Spherical Bessel functions sqrt(2/c) sin(n pi r / c) / r, n = 1 .. n_basis, of Gasteiger et al. (2020).

    Parameters
    ----------
    n_basis : int
        Number of functions.
    cutoff : float
        Cutoff c, Angstrom.
    """

    orders: Tensor

    def __init__(self, n_basis: int, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.register_buffer("orders", torch.arange(1, n_basis + 1, dtype=torch.get_default_dtype()))

    def forward(self, distance: Tensor) -> Tensor:
        """Map distances ``(...)`` to ``(..., n_basis)``; finite (not exact) below 1e-3 Angstrom, where no atom pair can be."""
        r = distance.clamp_min(1e-3).unsqueeze(-1)
        return math.sqrt(2.0 / self.cutoff) * torch.sin(self.orders.to(r.dtype) * (math.pi / self.cutoff) * r) / r


class RadialNetwork(nn.Module):
    """psi(r): a two-layer network from the radial basis to one weight per kernel path and channel (equation 2.2).

    Parameters
    ----------
    n_basis, hidden : int
        Sizes of the basis and of the hidden layer.
    n_paths, channels : int
        The output is ``(..., n_paths, channels)``.
    """

    def __init__(self, n_basis: int, hidden: int, n_paths: int, channels: int) -> None:
        super().__init__()
        self.n_paths = n_paths
        self.channels = channels
        self.hidden = nn.Linear(n_basis, hidden)
        self.out = nn.Linear(hidden, n_paths * channels)

    def forward(self, basis: Tensor) -> Tensor:
        """``(n_atoms, max_neighbors, n_basis)`` to ``(n_atoms, max_neighbors, n_paths, channels)``."""
        weights = self.out(nn.functional.silu(self.hidden(basis)))
        return weights.view(basis.shape[0], basis.shape[1], self.n_paths, self.channels)
