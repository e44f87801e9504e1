"""What every layer needs of the edges: distance, direction, envelope, and the coupling matrix that contracts features with the direction.

With u the direction, B_m the basis of the symmetric traceless matrices (`training.network.geometry`), G_ma = sum_b B_m,ab u_b and
y = G u, the harmonics of degree 2, the coupling matrix of an edge is, over the components of degree 0, 1 and 2,

        | 1   0    0  |      s          the scalars s, u.v and u.(T u) of features (s, v, t), T = sum_m t_m B_m,
    A = | 0  u^T   0  |      u.v
        | 0   0   y^T |      u.(T u)
        | 0   0   G^T |      T u        and the vector T u.

Its transpose builds messages: a scalar gives 1, u or y times itself, and a vector w the symmetric traceless part of u (x) w.
"""

import torch
from torch import Tensor, nn

from training.network.geometry import DEGREE_TWO_BASIS
from training.network.radial import envelope

#: Rows and columns of the coupling matrix, and of its block without the constant first row and column.
ROWS, COLUMNS = 6, 9
BLOCK = (ROWS - 1) * (COLUMNS - 1)
#: Logarithm of the envelope on padding and at the cutoff: its exponential is exactly zero beside any finite logit.
NO_WEIGHT = -1e30
SMALLEST_ENVELOPE = 1e-14


class FusedGeometry(nn.Module):
    """Distances, directions, coupling matrices and envelope of all edges.

    Parameters
    ----------
    cutoff : float
        Angstrom.
    """

    expansion: Tensor
    squared_norms: Tensor
    harmless: Tensor

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.no_weight = NO_WEIGHT
        self.smallest = SMALLEST_ENVELOPE
        basis = torch.tensor(DEGREE_TWO_BASIS, dtype=torch.float64)
        # From the monomials 1, u_a, u_a u_b to A. Whole numbers, exact in every precision; the norms follow in that of the network.
        expansion = torch.zeros(13, ROWS, COLUMNS, dtype=torch.float64)
        expansion[0, 0, 0] = 1.0
        expansion[1:4, 1, 1:4] = torch.eye(3, dtype=torch.float64)
        expansion[1:4, 3:6, 4:9] = basis.permute(2, 1, 0)
        expansion[4:13, 2, 4:9] = basis.reshape(5, 9).t()
        squared_norms = torch.ones(COLUMNS, dtype=torch.float64)
        squared_norms[4:9] = basis.square().sum([1, 2])
        self.register_buffer("expansion", expansion)
        self.register_buffer("squared_norms", squared_norms)
        self.register_buffer("harmless", torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))

    def forward(self, displacement: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute what layers need.

        Parameters
        ----------
        displacement, mask : Tensor
            As in `SE3Transformer.forward`.

        Returns
        -------
        tuple of Tensor
            Distance ``(n, k)`` in the precision of the displacement; direction ``(n, k, 3)``, coupling matrix ``(n * k, 6, 9)`` and
            logarithm of the envelope ``(n, k, 1)``, hugely negative on padding, in the precision of the network.
        """
        dtype = self.expansion.dtype
        # Padding gets a harmless displacement before any non-linear operation; the bound keeps coincident atoms finite.
        d = torch.where(mask.unsqueeze(-1), displacement, self.harmless.to(displacement.dtype))
        distance = torch.sqrt((d * d).sum(-1).clamp_min(1e-12))
        u = (d / distance.unsqueeze(-1)).to(dtype)
        logarithm = torch.log(envelope(distance, self.cutoff).clamp_min(self.smallest))
        log_cutoff = torch.where(mask, logarithm, self.no_weight).to(dtype).unsqueeze(-1)
        flat = u.view(-1, 3)
        products = (flat.unsqueeze(2) * flat.unsqueeze(1)).view(-1, 9)
        monomials = torch.cat([torch.ones_like(flat.narrow(1, 0, 1)), flat, products], dim=1)
        coupling = torch.mm(monomials, (self.expansion * torch.rsqrt(self.squared_norms)).view(13, -1))
        return distance, u, coupling.view(-1, self.expansion.shape[1], self.expansion.shape[2]), log_cutoff

    def adjoint(self, distance: Tensor, u: Tensor, mask: Tensor, g_distance: Tensor, g_coupling: Tensor, g_log_cutoff: Tensor) -> Tensor:
        """Gradient with respect to the displacements d = r u: g_d = g_r u + (g_u - u (u . g_u)) / r.

        Parameters
        ----------
        distance, u, mask : Tensor
            Results and argument of `forward`.
        g_distance, g_coupling, g_log_cutoff : Tensor
            Cotangents: ``(n, k)`` of the distance, ``(n * k, 5, 8)`` of the coupling matrix without its first row and column, and
            ``(n, k)`` of the logarithm of the envelope.

        Returns
        -------
        Tensor
            ``(n, k, 3)`` in the precision of the distance, zero on padding.
        """
        block = (self.expansion * torch.rsqrt(self.squared_norms)).narrow(0, 1, 12).narrow(1, 1, 5).narrow(2, 1, 8).reshape(12, -1)
        linear, quadratic = torch.mm(g_coupling.view(g_coupling.shape[0], -1), block.t()).split([3, 9], dim=1)
        # The derivative of u^T C u, with C symmetric as all B_m are, is 2 C u.
        g_u = torch.baddbmm(linear.unsqueeze(2), quadratic.view(-1, 3, 3), u.view(-1, 3, 1), alpha=2.0).view(u.shape).to(distance.dtype)
        # d log c / dr = c' / c, with c' = -168 x^5 (1 - x)^2 / cutoff and x = r / cutoff; nothing where c is below its bound.
        x = (distance / self.cutoff).clamp(max=1.0)
        value = envelope(distance, self.cutoff)
        slope = x.pow(5) * (1.0 - x).square() * (value >= self.smallest) / value.clamp_min(self.smallest)
        g_distance = g_distance + g_log_cutoff * slope * (-168.0 / self.cutoff)
        wide = u.to(distance.dtype)
        radial = g_distance - (wide * g_u).sum(-1) / distance
        gradient = torch.addcmul(g_u / distance.unsqueeze(-1), radial.unsqueeze(-1), wide)
        return gradient * mask.unsqueeze(-1)
