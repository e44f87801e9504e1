"""Spherical harmonics as polynomials of x, y, z, of any degree."""

import torch
from e3nn import o3
from torch import Tensor, nn

from training.network.reference.constants import ExactConstant


class SphericalHarmonics(nn.Module):
    """Real harmonics Y_0 .. Y_max of unit vectors, each of length 1, in e3nn's order of components.

    Coupling Y_J with the vector itself gives the next degree, Y_{J+1, m} ~ sum_ab C_abm Y_{J, a} u_b, with Clebsch-Gordan constants C. So every
    component is a polynomial of x, y, z and every derivative is finite, at the poles and at the zero vector too. Angles would not do:
    theta = arccos(z) has an infinite derivative on the z axis, which backpropagation turns into NaN.

    Parameters
    ----------
    max_degree : int
        Largest J.
    """

    def __init__(self, max_degree: int) -> None:
        super().__init__()
        couplings = []
        for degree in range(1, max_degree):
            c = o3.wigner_3j(degree, 1, degree + 1, dtype=torch.float64)
            # On the polar axis (y in e3nn) only m = 0 is there, the middle component: this makes it 1 again.
            couplings.append(ExactConstant(c / c[degree, 1, degree + 1]))
        self.couplings = nn.ModuleList(couplings)
        self.max_degree = max_degree

    def forward(self, direction: Tensor) -> list[Tensor]:
        """Unit vectors ``(n_atoms, max_neighbors, 3)`` to ``[(n_atoms, max_neighbors, 2*J + 1)]``."""
        harmonics = [torch.ones_like(direction[..., :1])]
        if self.max_degree > 0:
            harmonics.append(direction)
        for coupling in self.couplings:
            harmonics.append(torch.einsum("nka,nkb,abm->nkm", harmonics[-1], direction, coupling(direction)))
        return harmonics
