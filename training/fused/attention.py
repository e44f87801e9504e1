"""Attention over neighbours as in `training.network.attention`, with tabulated kernels, and its gradient.

A message is M = D + A^T L: with the coupling matrix A of the edge (`edges`), the sender's features F = (s, v, t), their contractions
A F = (s, u.v, u.(T u), T u), and one radial weight psi(r) per path and channel,

    o_l = psi_l0 s + psi_l1 u.v + psi_l2 u.(T u)        for each degree l of the message, 0 to 2 or 0 to 1
    p_l = psi_l v + psi'_l T u                          for l = 1, 2
    D   = (p_1, psi t)                                  the parts of degree 1 and 2 that need no coupling
    L   = (o_0, o_1, o_2, p_2)                          those that do.

Messages are never formed: their product with a query q is q . D + (A q) . L, and their sum over neighbours sum_j a D + sum_j A^T (a L),
where A q and the second sum are one matrix product for each receiver.

The gradient needs D and L also with the derivatives psi'(r) of the radial functions; the index m of the tensors below numbers the two
kinds, values first. Where only values are wanted, m is 0 alone.
"""

import torch
from torch import Tensor, nn

from training.fused.spline import SplineTable, spline_table
from training.network.attention import EquivariantAttention
from training.network.radial import BesselBasis


def _kernel_table(attention: EquivariantAttention, basis: BesselBasis, n_intervals: int) -> SplineTable:
    radial = attention.messages.radial

    def psi(distance: Tensor) -> Tensor:
        return radial(basis(distance).view(1, len(distance), -1)).reshape(len(distance), -1)

    return SplineTable(*spline_table(psi, basis.cutoff, n_intervals))


class ChannelSoftmax(nn.Module):
    """The smooth softmax, with every head's weight repeated over the channels of the head.

    In logarithms, alpha_ij = softmax over [b, s_ij + log c_ij], whose first entry, the sink, is dropped.

    Parameters
    ----------
    attention : EquivariantAttention
        Whose sink, heads and scale to take.
    """

    sum_in_head: Tensor
    sink: Tensor

    def __init__(self, attention: EquivariantAttention) -> None:
        super().__init__()
        heads, width = attention.num_heads, attention.head_channels
        block = torch.block_diag(*[torch.ones(width, width)] * heads)
        self.register_buffer("sum_in_head", block.to(attention.softmax.sink.dtype) * attention.logit_scale)
        self.register_buffer("sink", attention.softmax.sink.detach().repeat_interleave(width).view(1, 1, -1))

    def forward(self, products: Tensor, log_cutoff: Tensor) -> Tensor:
        """Products q_c k_c ``(n, k, channels)`` and log c ``(n, k, 1)`` to weights ``(n, k, channels)``."""
        logits = torch.matmul(products, self.sum_in_head) + log_cutoff
        with_sink = torch.cat([self.sink.expand(logits.shape[0], 1, logits.shape[2]), logits], dim=1)
        return torch.softmax(with_sink, dim=1).narrow(1, 1, products.shape[1])

    def adjoint(self, alpha: Tensor, g_alpha: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """g_s = alpha (g_alpha - sum_k alpha g_alpha): cotangents of the products and of log c.

        Parameters
        ----------
        alpha, g_alpha : Tensor
            ``(n, k, channels)``: the weights, and their cotangents, channel by channel.
        mean : Tensor
            ``(n, 1, channels)``: sum_k alpha g_alpha.

        Returns
        -------
        tuple of Tensor
            ``(n, k, channels)`` and ``(n, k)``.
        """
        g_logits = alpha * (g_alpha - mean)
        return torch.matmul(g_logits, self.sum_in_head), g_logits.sum(2)


class FusedFirstAttention(nn.Module):
    """Attention of the first layer, whose features are scalars: M = A^T (o_0, o_1, o_2) with o_l = psi_l s.

    The features there are those of the elements and do not depend on the positions, so its gradient ends at the edges.

    Parameters
    ----------
    attention : EquivariantAttention
        Of a first layer, degrees 0 to 2 out.
    basis : BesselBasis
        Radial basis of the network.
    n_intervals : int
        Intervals of the table.
    """

    def __init__(self, attention: EquivariantAttention, basis: BesselBasis, n_intervals: int) -> None:
        super().__init__()
        self.channels = attention.hidden_channels
        self.table = _kernel_table(attention, basis, n_intervals)
        self.softmax = ChannelSoftmax(attention)

    def forward(
        self, query: Tensor, value: Tensor, neighbors: Tensor, spline: tuple[Tensor, Tensor, Tensor], coupling: Tensor, log_cutoff: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As `FusedAttention.forward`; query ``(n, 1, c)`` of these receivers and value ``(n_atoms, 1, c)``."""
        n, k, c = neighbors.shape[0], neighbors.shape[1], self.channels
        made = self.make(query, value, neighbors, spline, coupling)
        values = made[0].select(1, 0).view(n, k, 3, c)
        alpha = self.softmax(query * values.select(2, 0), log_cutoff)
        return torch.bmm(made[1].transpose(1, 2), (values * alpha.unsqueeze(2)).view(n, k * 3, c)), alpha, made

    def make(self, query: Tensor, value: Tensor, neighbors: Tensor, spline: tuple[Tensor, Tensor, Tensor], coupling: Tensor) -> list[Tensor]:
        """As `FusedAttention.make`: o ``(e, m, 3, c)``, and the rows of A for it ``(n, 3 k, 9)``."""
        n, k = neighbors.shape[0], neighbors.shape[1]
        sender = value.index_select(0, neighbors.reshape(-1)).unsqueeze(1)  # (e, 1, 1, c)
        orders = self.table(spline[0], spline[1], spline[2]).view(n * k, -1, 3, self.channels) * sender
        return [orders, coupling.narrow(1, 0, 3).reshape(n, k * 3, -1)]

    def adjoint(
        self,
        made: list[Tensor],
        alpha: Tensor,
        gathered: Tensor,
        query: Tensor,
        neighbors: Tensor,
        coupling: Tensor,
        g: Tensor,
        g_value: Tensor,
        g_slots: Tensor,
        g_coupling: Tensor,
        g_log_cutoff: Tensor,
    ) -> Tensor:
        """As `FusedAttention.adjoint`; nothing is added to the cotangent of the values, and that of the query is an empty tensor."""
        orders, lift = made[0], made[1]
        n, k, c = neighbors.shape[0], neighbors.shape[1], self.channels
        values = orders.select(1, 0).view(n, k, 3, c)
        lifted = torch.bmm(lift, g).view(n, k, 3, c)
        g_alpha = (lifted * values).sum(2)
        g_products, g_logarithm = self.softmax.adjoint(alpha, g_alpha, (g * gathered).sum(1, keepdim=True))
        g_orders = lifted * alpha.unsqueeze(2)
        g_orders.select(2, 0).addcmul_(g_products, query)
        g_slots.add_((g_orders.view(n * k, 3, c) * orders.select(1, 1)).sum([1, 2]))
        g_log_cutoff.add_(g_logarithm)
        # Rows o_1 and o_2 of A hold u and y alone.
        outer = torch.bmm((values * alpha.unsqueeze(2)).view(n, k * 3, c), g.transpose(1, 2)).view(n * k, 3, -1)
        g_coupling.narrow(1, 0, 2).add_(outer.narrow(1, 1, 2).narrow(2, 1, 8))
        return torch.empty(0, device=g.device)


class FusedAttention(nn.Module):
    """Attention of a later layer.

    Parameters
    ----------
    attention : EquivariantAttention
        Degrees 0 to 2 in, 0 to 1 or 0 to 2 out.
    basis : BesselBasis
        Radial basis of the network.
    n_intervals : int
        Intervals of the table.
    """

    def __init__(self, attention: EquivariantAttention, basis: BesselBasis, n_intervals: int) -> None:
        super().__init__()
        self.channels = attention.hidden_channels
        self.degree_out = attention.messages.degree_out
        self.table = _kernel_table(attention, basis, n_intervals)
        self.softmax = ChannelSoftmax(attention)
        self.n_out = self.degree_out + 1
        self.sections = [3 * self.n_out, 2 * self.degree_out, self.degree_out - 1]
        self.n_paths = sum(self.sections)
        # Rows of L, and columns of A that they reach.
        self.rows = 6 if self.degree_out == 2 else 2
        self.columns = self.n_out * self.n_out

    def forward(
        self, query: Tensor, value: Tensor, neighbors: Tensor, spline: tuple[Tensor, Tensor, Tensor], coupling: Tensor, log_cutoff: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gather the weighted messages of some receivers.

        Parameters
        ----------
        query : Tensor
            ``(n, components_out, c)`` of the n receivers.
        value : Tensor
            ``(n_atoms, 9, c)`` of all atoms.
        neighbors : Tensor
            ``(n, k)`` int64.
        spline : tuple of Tensor
            Rows, weights and starts of `SplineBasis` for the e = n k edges; with slopes if `adjoint` is to follow.
        coupling, log_cutoff : Tensor
            ``(e, 6, 9)`` and ``(n, k, 1)`` of `FusedGeometry`.

        Returns
        -------
        tuple of Tensor, Tensor and list of Tensor
            The sum ``(n, components_out, c)``, the weights ``(n, k, c)``, and what `make` gives.
        """
        n, k, c = neighbors.shape[0], neighbors.shape[1], self.channels
        made = self.make(query, value, neighbors, spline, coupling)
        d, low = made[2].select(1, 0).view(n, k, -1, c), made[3].select(1, 0).view(n, k, -1, c)
        rest = query.narrow(1, 1, self.columns - 1).unsqueeze(1)
        alpha = self.softmax((made[5] * low).sum(2) + (rest * d).sum(2), log_cutoff)
        return self._gather(alpha, made[4], d, low), alpha, made

    def make(self, query: Tensor, value: Tensor, neighbors: Tensor, spline: tuple[Tensor, Tensor, Tensor], coupling: Tensor) -> list[Tensor]:
        """What is made of the edges before the softmax, arguments as `forward`; `adjoint` needs it.

        Returns
        -------
        list of Tensor
            F ``(e, 9, c)``, psi ``(e, m, paths, c)``, D ``(e, m, components_out - 1, c)``, L ``(e, m, rows, c)``, the part
            of A that acts on L ``(n, k rows, components_out)``, and A q ``(n, k, rows, c)``.
        """
        n, k, c = neighbors.shape[0], neighbors.shape[1], self.channels
        sender = value.index_select(0, neighbors.reshape(-1))
        contracted = torch.bmm(coupling, sender)
        psi = self.table(spline[0], spline[1], spline[2]).view(n * k, -1, self.n_paths, c)
        direct, lifted = self._parts(psi, sender, contracted)
        lift = coupling if self.degree_out == 2 else coupling.narrow(1, 0, self.rows).narrow(2, 0, self.columns)
        lift = lift.reshape(n, k * self.rows, self.columns)
        return [sender, psi, direct, lifted, lift, torch.bmm(lift, query).view(n, k, self.rows, c)]

    def _parts(self, psi: Tensor, sender: Tensor, contracted: Tensor) -> tuple[Tensor, Tensor]:
        """D and L."""
        e, m, c = psi.shape[0], psi.shape[1], self.channels
        psi0, psi1, psi2 = psi.split(self.sections, dim=2)
        orders = (psi0.view(e, m, 3, self.n_out, c) * contracted.narrow(1, 0, 3).view(e, 1, 3, 1, c)).sum(2)
        psi1 = psi1.view(e, m, self.degree_out, 2, 1, c)
        vectors = psi1.select(3, 0) * sender.narrow(1, 1, 3).view(e, 1, 1, 3, c)
        vectors = torch.addcmul(vectors, psi1.select(3, 1), contracted.narrow(1, 3, 3).view(e, 1, 1, 3, c))
        if self.degree_out == 1:
            return vectors.select(2, 0), orders
        tensors = psi2 * sender.narrow(1, 4, 5).unsqueeze(1)
        return torch.cat([vectors.select(2, 0), tensors], dim=2), torch.cat([orders, vectors.select(2, 1)], dim=2)

    def _gather(self, weights: Tensor, lift: Tensor, direct: Tensor, lifted: Tensor) -> Tensor:
        """sum_j w D + A^T (w L) with weights ``(n, k, c)``: ``(n, components_out, c)``."""
        w = weights.unsqueeze(2)
        out = torch.bmm(lift.transpose(1, 2), (lifted * w).view(lift.shape[0], lift.shape[1], -1))
        out.narrow(1, 1, self.columns - 1).add_((direct * w).sum(1))
        return out

    def adjoint(
        self,
        made: list[Tensor],
        alpha: Tensor,
        gathered: Tensor,
        query: Tensor,
        neighbors: Tensor,
        coupling: Tensor,
        g: Tensor,
        g_value: Tensor,
        g_slots: Tensor,
        g_coupling: Tensor,
        g_log_cutoff: Tensor,
    ) -> Tensor:
        """Cotangents of all that `forward` was given.

        With the cotangent g of the result, that of a message is g_M = a g + g_s q, where g_s is that of the product of head and query;
        then g_D is its parts of degree 1 and 2, g_L = A g_M, and what D and L are made of follows by the product rule.

        Parameters
        ----------
        made : list of Tensor
            From `forward`, or again from `make`, with slopes.
        alpha, gathered : Tensor
            Weights and result of `forward`.
        query, neighbors, coupling : Tensor
            As given to `forward`.
        g : Tensor
            ``(n, components_out, c)``, cotangent of the result.
        g_value : Tensor
            ``(n_atoms, 9, c)``, to which the cotangent of the values is added.
        g_slots, g_coupling, g_log_cutoff : Tensor
            ``(e,)``, ``(e, 5, 8)`` and ``(n, k)``, to which those of the distance in units of the spline's interval, of the coupling matrix
            without its first row and column, and of the logarithm of the envelope are added.

        Returns
        -------
        Tensor
            Cotangent of the query, of its shape.
        """
        sender, psi, direct, lifted, lift, asked = made[0], made[1], made[2], made[3], made[4], made[5]
        n, k, c = neighbors.shape[0], neighbors.shape[1], self.channels
        e = n * k
        d, low = direct.select(1, 0).view(n, k, -1, c), lifted.select(1, 0).view(n, k, -1, c)
        rest, g_rest = query.narrow(1, 1, self.columns - 1).unsqueeze(1), g.narrow(1, 1, self.columns - 1).unsqueeze(1)
        g_asked = torch.bmm(lift, g).view(n, k, self.rows, c)
        g_alpha = (g_asked * low).sum(2) + (g_rest * d).sum(2)
        g_products, g_logarithm = self.softmax.adjoint(alpha, g_alpha, (g * gathered).sum(1, keepdim=True))
        g_log_cutoff.add_(g_logarithm)
        g_query = self._gather(g_products, lift, d, low)
        w, s = alpha.unsqueeze(2), g_products.unsqueeze(2)
        g_low = torch.addcmul(g_asked * w, asked, s).view(e, self.rows, c)
        g_direct = torch.addcmul(g_rest * w, rest, s).view(e, self.columns - 1, c)
        g_slots.add_((g_low * lifted.select(1, 1)).sum([1, 2])).add_((g_direct * direct.select(1, 1)).sum([1, 2]))
        outer = torch.bmm(lifted.select(1, 0).narrow(1, 1, self.rows - 1), g_direct.transpose(1, 2))
        g_coupling.narrow(1, 0, self.rows - 1).narrow(2, 0, self.columns - 1).add_(outer)
        psi0, psi1, psi2 = psi.select(1, 0).split(self.sections, dim=1)
        g_scalars = (psi0.view(e, 3, self.n_out, c) * g_low.narrow(1, 0, self.n_out).unsqueeze(1)).sum(2)
        psi1 = psi1.view(e, self.degree_out, 2, 1, c)
        g_vectors = psi1.select(1, 0) * g_direct.narrow(1, 0, 3).unsqueeze(1)  # (e, 2, 3, c): of v and of T u
        if self.degree_out == 2:
            g_vectors = torch.addcmul(g_vectors, psi1.select(1, 1), g_low.narrow(1, 3, 3).unsqueeze(1))
        g_contracted = torch.cat([g_scalars, g_vectors.select(1, 1)], dim=1)
        g_coupling.baddbmm_(g_contracted.narrow(1, 1, 5), sender.narrow(1, 1, 8).transpose(1, 2))
        g_sender = torch.bmm(coupling.transpose(1, 2), g_contracted)
        g_sender.narrow(1, 1, 3).add_(g_vectors.select(1, 0))
        if self.degree_out == 2:
            g_sender.narrow(1, 4, 5).addcmul_(psi2, g_direct.narrow(1, 3, 5))
        g_value.index_add_(0, neighbors.reshape(-1), g_sender)
        return g_query
