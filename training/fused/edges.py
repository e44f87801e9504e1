"""What every layer needs of the edges: distance, direction, envelope, and the coupling matrix that contracts features with the direction.

With u the direction, B_m the basis of the symmetric traceless matrices (`training.network.geometry`), G_ma = sum_b B_m,ab u_b and
y = G u, the harmonics of degree 2, the coupling matrix of an edge is, over the components of degree 0, 1 and 2,

        | 1   0    0  |      s          the scalars s, u.v and u.(T u) of features (s, v, t), T = sum_m t_m B_m,
    A = | 0  u^T   0  |      u.v
        | 0   0   y^T |      u.(T u)
        | 0   0   G^T |      T u        and the vector T u.

Its transpose builds messages: a scalar gives 1, u or y times itself, and a vector w the symmetric traceless part of u (x) w.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.fused.spline import values_alone
from training.network.geometry import DEGREE_TWO_BASIS
from training.network.radial import envelope

#: Rows and columns of the coupling matrix, and of its block without the constant first row and column.
ROWS, COLUMNS = 6, 9
BLOCK = (ROWS - 1) * (COLUMNS - 1)
#: Logarithm of the envelope on padding and at the cutoff: its exponential is exactly zero beside any finite logit.
NO_WEIGHT = -1e30
SMALLEST_ENVELOPE = 1e-14


class Edges(NamedTuple):
    """What attention needs of the edges of n receivers, k to each, padding included.

    Attributes
    ----------
    neighbors : Tensor
        ``(n, k)`` int64, contiguous.
    spline : tuple of Tensor
        Rows, weights and starts of `SplineBasis`, of the n k edges one after the other.
    coupling : Tensor
        ``(n k, 6, 9)``.
    lift : Tensor
        The same with its rows before the neighbours, ``(n, 6, k, 9)``: one matrix for each receiver.
    log_cutoff : Tensor
        ``(n, k, 1)``.
    """

    neighbors: Tensor
    spline: tuple[Tensor, Tensor, Tensor]
    coupling: Tensor
    lift: Tensor
    log_cutoff: Tensor


class EdgeCotangents(NamedTuple):
    """Where attention adds up the derivatives of the energy by what it was given of the edges.

    Attributes
    ----------
    slots : Tensor
        ``(n, k)``, of the distances in units of the spline's interval.
    coupling : Tensor
        ``(n, 5, k, 8)``, of the coupling matrices without their first row and column.
    log_cutoff : Tensor
        ``(n, k)``.
    """

    slots: Tensor
    coupling: Tensor
    log_cutoff: Tensor


def make_edges(neighbors: Tensor, spline: tuple[Tensor, Tensor, Tensor], coupling: Tensor, log_cutoff: Tensor) -> Edges:
    """`Edges` with the lift that belongs to the coupling."""
    n, k = neighbors.shape[0], neighbors.shape[1]
    lift = coupling.view(n, k, coupling.shape[1], coupling.shape[2]).transpose(1, 2).contiguous()
    return Edges(neighbors, spline, coupling, lift, log_cutoff)


def without_slopes(edges: Edges) -> Edges:
    """The same edges, for values of radial functions alone."""
    return Edges(edges.neighbors, values_alone(edges.spline), edges.coupling, edges.lift, edges.log_cutoff)


def width(mask: Tensor) -> Tensor:
    """Slots of each receiver up to its last neighbour that is one: ``(n,)`` int64."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)


def order_by_width(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Atoms in the order of their number of slots, and the place of each atom in it: portions then hold atoms with equally many."""
    order = torch.argsort(width(mask), stable=True)
    return order, torch.argsort(order)


def in_order(order: Tensor, place: Tensor, species: Tensor, displacement: Tensor, neighbors: Tensor, mask: Tensor) -> list[Tensor]:
    """Arguments of the network with the atoms in another order."""
    renamed = place.index_select(0, neighbors.index_select(0, order).view(-1)).view(neighbors.shape)
    return [species.index_select(0, order), displacement.index_select(0, order), renamed, mask.index_select(0, order)]


def in_portions(
    neighbors: Tensor, spline: tuple[Tensor, Tensor, Tensor], coupling: Tensor, log_cutoff: Tensor, mask: Tensor, receivers: int
) -> list[Edges]:
    """Edges of so many receivers at a time, each portion no wider than its last neighbour that is one.

    Atoms have different numbers of neighbours: a quarter of the slots of liquid water is padding, and most of that ends here. A single portion stays
    as it is, as on a GPU, where widths would have to be waited for.

    Parameters
    ----------
    neighbors, spline, coupling, log_cutoff
        As in `Edges`, of all receivers.
    mask : Tensor
        ``(n, k)``, of neighbours that are ones.
    receivers : int
        Of a portion; the last may have fewer.
    """
    n, k = neighbors.shape[0], neighbors.shape[1]
    if receivers >= n:
        return [make_edges(neighbors, spline, coupling, log_cutoff)]
    out: list[Edges] = []
    rows, weights, starts = spline
    kinds = rows.shape[1]
    at_once = receivers * k
    # split and not slices: the gradient of a slice fills a tensor of the full size with zeros, that of split does not.
    for j, r, w, a, c, widths in zip(  # noqa: B905 - TorchScript knows no strict=
        neighbors.split(receivers),
        rows.split(at_once),
        weights.split(at_once),
        coupling.split(at_once),
        log_cutoff.split(receivers),
        width(mask).split(receivers),
    ):
        wide = max(int(widths.max()), 1)
        m = j.shape[0]
        r = r.view(m, k, kinds, 4).narrow(1, 0, wide).reshape(m * wide, kinds, 4)
        w = w.view(m, k, kinds, 4).narrow(1, 0, wide).reshape(m * wide, kinds, 4)
        a = a.view(m, k, a.shape[1], a.shape[2]).narrow(1, 0, wide).reshape(m * wide, a.shape[1], a.shape[2])
        out.append(make_edges(j.narrow(1, 0, wide).contiguous(), (r, w, starts.narrow(0, 0, m * wide * kinds)), a, c.narrow(1, 0, wide)))
    return out


def cotangents_in_portions(whole: EdgeCotangents, portions: list[Edges]) -> list[EdgeCotangents]:
    """The places in `whole` of the edges of each portion."""
    out: list[EdgeCotangents] = []
    start = 0
    for edges in portions:
        n, k = edges.neighbors.shape[0], edges.neighbors.shape[1]
        slots, log_cutoff = whole.slots.narrow(0, start, n).narrow(1, 0, k), whole.log_cutoff.narrow(0, start, n).narrow(1, 0, k)
        out.append(EdgeCotangents(slots, whole.coupling.narrow(0, start, n).narrow(2, 0, k), log_cutoff))
        start += n
    return out


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

    def no_cotangents(self, log_cutoff: Tensor) -> EdgeCotangents:
        """Zeros, for edges with these envelopes."""
        n, k = log_cutoff.shape[0], log_cutoff.shape[1]
        return EdgeCotangents(
            log_cutoff.new_zeros([n, k]),
            log_cutoff.new_zeros([n, self.expansion.shape[1] - 1, k, self.expansion.shape[2] - 1]),
            log_cutoff.new_zeros([n, k]),
        )

    def adjoint(self, distance: Tensor, u: Tensor, mask: Tensor, g_distance: Tensor, g_edges: EdgeCotangents) -> Tensor:
        """Gradient with respect to the displacements d = r u: g_d = g_r u + (g_u - u (u . g_u)) / r.

        Parameters
        ----------
        distance, u, mask : Tensor
            Results and argument of `forward`.
        g_distance : Tensor
            ``(n, k)``, cotangent of the distance.
        g_edges : EdgeCotangents
            Those of the coupling matrix and of the logarithm of the envelope.

        Returns
        -------
        Tensor
            ``(n, k, 3)`` in the precision of the distance, zero on padding.
        """
        block = (self.expansion * torch.rsqrt(self.squared_norms)).narrow(0, 1, 12).narrow(1, 1, 5).narrow(2, 1, 8).reshape(12, -1)
        linear, quadratic = torch.mm(g_edges.coupling.transpose(1, 2).reshape(-1, block.shape[1]), block.t()).split([3, 9], dim=1)
        # The derivative of u^T C u, with C symmetric as all B_m are, is 2 C u.
        g_u = torch.baddbmm(linear.unsqueeze(2), quadratic.view(-1, 3, 3), u.view(-1, 3, 1), alpha=2.0).view(u.shape).to(distance.dtype)
        # d log c / dr = c' / c, with c' = -168 x^5 (1 - x)^2 / cutoff and x = r / cutoff; nothing where c is below its bound.
        x = (distance / self.cutoff).clamp(max=1.0)
        value = envelope(distance, self.cutoff)
        slope = x * x.square().square() * (1.0 - x).square() * (value >= self.smallest) / value.clamp_min(self.smallest)
        g_distance = g_distance + g_edges.log_cutoff * slope * (-168.0 / self.cutoff)
        wide = u.to(distance.dtype)
        radial = g_distance - (wide * g_u).sum(-1) / distance
        gradient = torch.addcmul(g_u / distance.unsqueeze(-1), radial.unsqueeze(-1), wide)
        return gradient * mask.unsqueeze(-1)
