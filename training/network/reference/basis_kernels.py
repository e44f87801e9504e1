"""Equation 2.1: the kernels that rotational equivariance allows, as far as the direction goes."""

import math

import torch
from e3nn import o3
from torch import Tensor, nn

from training.network.reference.constants import ExactConstant
from training.network.reference.spherical_harmonics import SphericalHarmonics


def coupled_degrees(receiver: int, sender: int, natural_parity: bool) -> list[int]:
    """All J = |k - l| .. k + l; with natural parity only those with l + k + J even."""
    degrees = range(abs(receiver - sender), receiver + sender + 1)
    return [j for j in degrees if not natural_parity or (receiver + sender + j) % 2 == 0]


class _CoupledHarmonics(nn.Module):
    """One pair (l, k) of equation 2.1: harmonics to ``(n_atoms, max_neighbors, 2*l + 1, n_J, 2*k + 1)``."""

    def __init__(self, receiver: int, sender: int, natural_parity: bool) -> None:
        super().__init__()
        self.degrees = coupled_degrees(receiver, sender, natural_parity)
        constants = []
        for j in self.degrees:
            # Scaled so that features with components of unit size give messages with components of unit size.
            scale = math.sqrt((2 * receiver + 1) * (2 * j + 1))
            constants.append(ExactConstant(scale * o3.wigner_3j(receiver, sender, j, dtype=torch.float64)))
        self.constants = nn.ModuleList(constants)

    def forward(self, harmonics: list[Tensor]) -> Tensor:
        kernels: list[Tensor] = []
        for path, constant in enumerate(self.constants):
            y = harmonics[self.degrees[path]]
            kernels.append(torch.einsum("abm,nkm->nkab", constant(y), y))  # equation 2.1
        return torch.stack(kernels, dim=3)


class BasisKernels(nn.Module):
    """Equation 2.1: W_J^{lk}(u) = sum_m Y_Jm(u) Q_Jm^{lk} for every pair of degrees and every J, computed once per forward pass.

    Q are Clebsch-Gordan constants (e3nn's Wigner 3j symbols), so that W_J^{lk}(R u) = D^l(R) W_J^{lk}(u) D^k(R)^T.

    Parameters
    ----------
    max_degree : int
        Largest degree l and k of the features.
    natural_parity : bool
        Only J with l + k + J even.
    """

    def __init__(self, max_degree: int, natural_parity: bool) -> None:
        super().__init__()
        self.harmonics = SphericalHarmonics(2 * max_degree)
        degrees = range(max_degree + 1)
        self.pairs = nn.ModuleList(_CoupledHarmonics(receiver, sender, natural_parity) for receiver in degrees for sender in degrees)

    def forward(self, direction: Tensor) -> list[Tensor]:
        """Evaluate all basis kernels.

        Parameters
        ----------
        direction : Tensor
            Unit vectors ``(n_atoms, max_neighbors, 3)``.

        Returns
        -------
        list of Tensor
            Entry ``l * (max_degree + 1) + k`` is ``(n_atoms, max_neighbors, 2*l + 1, n_J, 2*k + 1)``.
        """
        harmonics = self.harmonics(direction)
        kernels: list[Tensor] = []
        for pair in self.pairs:
            kernels.append(pair(harmonics))
        return kernels
