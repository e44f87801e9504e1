"""Attention over neighbours as in `training.network.attention`, with tabulated kernels, and its gradient.

A message is M = D + A^T L: with the coupling matrix A of the edge (`edges`), the sender's features F = (s, v, t), their contractions
A F = (s, u.v, u.(T u), T u), and one radial weight psi(r) per path and channel,

    o_l = psi_l0 s + psi_l1 u.v + psi_l2 u.(T u)        for each degree l of the message, 0 to 2 or 0 to 1
    p_l = psi_l v + psi'_l T u                          for l = 1, 2
    D   = (p_1, psi t)                                  the parts of degree 1 and 2 that need no coupling
    L   = (o_0, o_1, o_2, p_2)                          those that do.

Messages are never formed: their product with a query q is q . D + (A q) . L, and their sum over neighbours sum_j a D + sum_j A^T (a L),
where A q and the second sum are one matrix product for each receiver.

The gradient needs the derivatives psi'(r) of the radial functions too; the index m of the tensors below numbers the two kinds, values
first. Where only values are wanted, m is 0 alone.

What is made of edges has the components before the neighbours, ``(n, components, k, c)`` for n receivers of k neighbours: then what broadcasts over
components is k c numbers in a row, not c, which on a processor is several times as fast; and A q, of all neighbours of a receiver, comes
in that order from one product.
"""

import torch
from torch import Tensor, nn

from training.fused.edges import EdgeCotangents, Edges
from training.fused.spline import SplineTable, spline_table
from training.network.attention import EquivariantAttention
from training.network.radial import BesselBasis


def _kernel_table(attention: EquivariantAttention, basis: BesselBasis, n_intervals: int) -> SplineTable:
    radial = attention.messages.radial

    def psi(distance: Tensor) -> Tensor:
        return radial(basis(distance).view(1, len(distance), -1)).reshape(len(distance), -1)

    return SplineTable(*spline_table(psi, basis.cutoff, n_intervals))


def _by_component(of_edges: Tensor, n: int, k: int, channels: int) -> Tensor:
    """``(n k, ...)`` with the channels last to ``(n, components, k, channels)``."""
    return of_edges.view(n, k, -1, channels).transpose(1, 2).contiguous()


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
        flat = torch.addmm(log_cutoff.reshape(-1, 1), products.view(-1, products.shape[2]), self.sum_in_head)
        logits = flat.view(products.shape)
        if logits.is_cuda:
            return self.by_sums(logits)
        with_sink = torch.cat([self.sink.expand(logits.shape[0], 1, logits.shape[2]), logits], dim=1)
        return torch.softmax(with_sink, dim=1).narrow(1, 1, products.shape[1])

    def by_sums(self, logits: Tensor) -> Tensor:
        """The weights in plain steps, of logits ``(n, k, channels)``: a GPU is slow at the softmax of a dimension that is not the last."""
        largest = torch.maximum(logits.amax(1, keepdim=True), self.sink)
        weights = torch.exp(logits - largest)
        return weights / (weights.sum(1, keepdim=True) + torch.exp(self.sink - largest))

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

    def forward(self, query: Tensor, value: Tensor, edges: Edges) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As `FusedAttention.forward`; query ``(n, 1, c)`` of these receivers and value ``(n_atoms, 1, c)``."""
        n, k, c = edges.neighbors.shape[0], edges.neighbors.shape[1], self.channels
        made = self.make(query, value, edges)
        values = made[0].select(1, 0)
        alpha = self.softmax(query * values.select(1, 0), edges.log_cutoff)
        return torch.bmm(made[1].transpose(1, 2), (values * alpha.unsqueeze(1)).view(n, 3 * k, c)), alpha, made

    def make(self, query: Tensor, value: Tensor, edges: Edges) -> list[Tensor]:
        """As `FusedAttention.make`: o ``(n, m, 3, k, c)``, and the rows of A for it ``(n, 3 k, 9)``."""
        n, k, c = edges.neighbors.shape[0], edges.neighbors.shape[1], self.channels
        sender = value.index_select(0, edges.neighbors.view(-1)).view(n, 1, 1, k, c)
        psi = _by_component(self.table(edges.spline), n, k, c)
        return [psi.view(n, -1, 3, k, c) * sender, edges.lift.narrow(1, 0, 3).view(n, 3 * k, 9)]

    def adjoint(
        self,
        made: list[Tensor],
        alpha: Tensor,
        gathered: Tensor,
        query: Tensor,
        edges: Edges,
        g: Tensor,
        g_value: Tensor,
        g_edges: EdgeCotangents,
    ) -> Tensor:
        """As `FusedAttention.adjoint`; nothing is added to the cotangent of the values, and that of the query is an empty tensor."""
        orders, lift = made[0], made[1]
        n, k, c = edges.neighbors.shape[0], edges.neighbors.shape[1], self.channels
        values = orders.select(1, 0)
        lifted = torch.bmm(lift, g).view(n, 3, k, c)
        g_alpha = (lifted * values).sum(1)
        g_products, g_logarithm = self.softmax.adjoint(alpha, g_alpha, (g * gathered).sum(1, keepdim=True))
        w = alpha.unsqueeze(1)
        g_orders = lifted * w
        g_orders.select(1, 0).addcmul_(g_products, query)
        g_edges.slots.add_((g_orders * orders.select(1, 1)).sum(1).sum(2))
        g_edges.log_cutoff.add_(g_logarithm)
        # Rows o_1 and o_2 of A hold u and y alone.
        outer = torch.bmm(g, (values.narrow(1, 1, 2) * w).view(n, 2 * k, c).transpose(1, 2)).view(n, -1, 2, k)
        g_edges.coupling.narrow(1, 0, 2).add_(outer.narrow(1, 1, 8).permute([0, 2, 3, 1]))
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

    def forward(self, query: Tensor, value: Tensor, edges: Edges) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gather the weighted messages of some receivers.

        Parameters
        ----------
        query : Tensor
            ``(n, components_out, c)`` of the n receivers.
        value : Tensor
            ``(n_atoms, 9, c)`` of all atoms.
        edges : Edges
            Of these receivers; the spline with slopes if `adjoint` is to follow.

        Returns
        -------
        tuple of Tensor, Tensor and list of Tensor
            The sum ``(n, components_out, c)``, the weights ``(n, k, c)``, and what `make` gives.
        """
        made = self.make(query, value, edges)
        direct, low, lift, asked = made[3], made[4], made[5], made[6]
        rest = query.narrow(1, 1, self.columns - 1).unsqueeze(2)
        alpha = self.softmax((asked * low).sum(1) + (rest * direct).sum(1), edges.log_cutoff)
        return self._gather(alpha, lift, direct, low), alpha, made

    def make(self, query: Tensor, value: Tensor, edges: Edges) -> list[Tensor]:
        """What is made of the edges before the softmax, arguments as `forward`; `adjoint` needs it.

        Returns
        -------
        list of Tensor
            F ``(n, 9, k, c)`` and A F ``(n, 6, k, c)``; psi ``(n, m, paths, k, c)``, D ``(n, components_out - 1, k, c)``, L ``(n, rows, k, c)``, the
            part of A that acts on L ``(n, rows k, components_out)``, and A q ``(n, rows, k, c)``; F as it comes, ``(n k, 9, c)``.
        """
        n, k, c = edges.neighbors.shape[0], edges.neighbors.shape[1], self.channels
        of_edge = value.index_select(0, edges.neighbors.view(-1))
        contracted = _by_component(torch.bmm(edges.coupling, of_edge), n, k, c)
        sender = _by_component(of_edge, n, k, c)
        psi = _by_component(self.table(edges.spline), n, k, c).view(n, -1, self.n_paths, k, c)
        direct, low = self._parts(psi.select(1, 0), sender, contracted)
        lift = edges.lift.narrow(1, 0, self.rows).view(n, self.rows * k, 9).narrow(2, 0, self.columns)
        return [sender, contracted, psi, direct, low, lift, torch.bmm(lift, query).view(n, self.rows, k, c), of_edge]

    def _parts(self, psi: Tensor, sender: Tensor, contracted: Tensor) -> tuple[Tensor, Tensor]:
        """D and L."""
        n, k, c = psi.shape[0], psi.shape[2], self.channels
        psi0, psi1, psi2 = psi.split(self.sections, dim=1)
        orders = (psi0.view(n, 3, self.n_out, k, c) * contracted.narrow(1, 0, 3).unsqueeze(2)).sum(1)
        psi1 = psi1.view(n, self.degree_out, 2, 1, k, c)
        vectors = psi1.select(2, 0) * sender.narrow(1, 1, 3).unsqueeze(1)
        vectors = torch.addcmul(vectors, psi1.select(2, 1), contracted.narrow(1, 3, 3).unsqueeze(1))
        if self.degree_out == 1:
            return vectors.select(1, 0), orders
        tensors = psi2 * sender.narrow(1, 4, 5)
        return torch.cat([vectors.select(1, 0), tensors], dim=1), torch.cat([orders, vectors.select(1, 1)], dim=1)

    def _gather(self, weights: Tensor, lift: Tensor, direct: Tensor, low: Tensor) -> Tensor:
        """sum_j w D + A^T (w L) with weights ``(n, k, c)``: ``(n, components_out, c)``."""
        w = weights.unsqueeze(1)
        out = torch.bmm(lift.transpose(1, 2), (low * w).view(lift.shape[0], lift.shape[1], -1))
        out.narrow(1, 1, self.columns - 1).add_((direct * w).sum(2))
        return out

    def adjoint(
        self,
        made: list[Tensor],
        alpha: Tensor,
        gathered: Tensor,
        query: Tensor,
        edges: Edges,
        g: Tensor,
        g_value: Tensor,
        g_edges: EdgeCotangents,
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
        query, edges
            As given to `forward`, the spline with slopes.
        g : Tensor
            ``(n, components_out, c)``, cotangent of the result.
        g_value : Tensor
            ``(n_atoms, 9, c)``, to which the cotangent of the values is added.
        g_edges : EdgeCotangents
            To which those of the edges are added.

        Returns
        -------
        Tensor
            Cotangent of the query, of its shape.
        """
        sender, contracted, psi, direct, low, lift, asked, of_edge = made[0], made[1], made[2], made[3], made[4], made[5], made[6], made[7]
        n, k, c = edges.neighbors.shape[0], edges.neighbors.shape[1], self.channels
        rest, g_rest = query.narrow(1, 1, self.columns - 1).unsqueeze(2), g.narrow(1, 1, self.columns - 1).unsqueeze(2)
        g_asked = torch.bmm(lift, g).view(n, self.rows, k, c)
        g_alpha = (g_asked * low).sum(1) + (g_rest * direct).sum(1)
        g_products, g_logarithm = self.softmax.adjoint(alpha, g_alpha, (g * gathered).sum(1, keepdim=True))
        g_edges.log_cutoff.add_(g_logarithm)
        w, s = alpha.unsqueeze(1), g_products.unsqueeze(1)
        low_w, low_s = (low * w).view(n, -1, c), (low * s).view(n, -1, c)
        g_query = torch.bmm(lift.transpose(1, 2), low_s)
        g_query.narrow(1, 1, self.columns - 1).add_((direct * s).sum(2))
        # A as it builds messages: g_A^T = g_M L^T, which processors multiply faster than L g_M^T.
        outer = torch.baddbmm(torch.bmm(g, low_w.transpose(1, 2)), query, low_s.transpose(1, 2)).view(n, self.columns, self.rows, k)
        inner = outer.narrow(1, 1, self.columns - 1).narrow(2, 1, self.rows - 1).permute([0, 2, 3, 1])
        g_edges.coupling.narrow(1, 0, self.rows - 1).narrow(3, 0, self.columns - 1).add_(inner)
        g_low = g_asked.mul_(w).addcmul_(asked, s)
        g_direct = (g_rest * w).addcmul_(rest, s)
        vectors, turned = sender.narrow(1, 1, 3), contracted.narrow(1, 3, 3)  # v and T u
        psi0, psi1, psi2 = psi.split(self.sections, dim=2)
        # Both with psi, which gives the cotangents of A F and F, and with psi', which gives that of the distance.
        psi0, g_orders = psi0.view(n, 2, 3, self.n_out, k, c), g_low.narrow(1, 0, self.n_out).view(n, 1, 1, self.n_out, k, c)
        g_scalars = psi0.select(3, 0) * g_orders.select(3, 0)
        for order in range(1, self.n_out):
            g_scalars.addcmul_(psi0.select(3, order), g_orders.select(3, order))
        psi1 = psi1.view(n, 2, self.degree_out, 2, 1, k, c)
        g_vectors = psi1.select(2, 0) * g_direct.narrow(1, 0, 3).view(n, 1, 1, 3, k, c)
        if self.degree_out == 2:
            g_vectors.addcmul_(psi1.select(2, 1), g_low.narrow(1, 3, 3).view(n, 1, 1, 3, k, c))
        slope = (g_scalars.select(1, 1) * contracted.narrow(1, 0, 3)).addcmul_(g_vectors.select(1, 1).select(1, 0), vectors)
        slope = slope.addcmul_(g_vectors.select(1, 1).select(1, 1), turned).sum(1)
        g_vectors = g_vectors.select(1, 0)
        g_contracted = torch.cat([g_scalars.select(1, 0).transpose(1, 2), g_vectors.select(1, 1).transpose(1, 2)], dim=2).view(n * k, 6, c)
        # A as it contracts: g_A = g_(A F) F^T.
        outer = torch.bmm(g_contracted, of_edge.transpose(1, 2)).view(n, k, 6, 9)
        g_edges.coupling.add_(outer.narrow(2, 1, 5).narrow(3, 1, 8).transpose(1, 2))
        g_sender = torch.bmm(edges.coupling.transpose(1, 2), g_contracted).view(n, k, 9, c).transpose(1, 2)
        g_sender.narrow(1, 1, 3).add_(g_vectors.select(1, 0))
        if self.degree_out == 2:
            g_tensors = g_direct.narrow(1, 3, 5)
            slope.add_((psi2.select(1, 1) * (sender.narrow(1, 4, 5) * g_tensors).sum(1, keepdim=True)).squeeze(1))
            g_sender.narrow(1, 4, 5).addcmul_(psi2.select(1, 0), g_tensors)
        g_edges.slots.add_(slope.sum(2))
        g_value.index_add_(0, edges.neighbors.view(-1), g_sender.transpose(1, 2).view(n * k, 9, c))
        return g_query
