"""Attention over neighbours as in `training.network.attention`, with tabulated kernels and over portions of the receivers."""

import torch
from torch import Tensor, nn

from training.fused.spline import SplineTable, spline_table
from training.network.attention import EquivariantAttention
from training.network.radial import BesselBasis


def _kernel_table(attention: EquivariantAttention, basis: BesselBasis, n_intervals: int) -> SplineTable:
    radial = attention.messages.radial

    def psi(distance: Tensor) -> Tensor:
        return radial(basis(distance).view(1, len(distance), -1)).reshape(len(distance), -1)

    return SplineTable(spline_table(psi, basis.cutoff, n_intervals))


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
        """Products q_c k_c ``(n, k, channels)`` and log c ``(n, k, 1)`` to weights ``(n, k, 1, channels)``."""
        logits = torch.matmul(products, self.sum_in_head) + log_cutoff
        with_sink = torch.cat([self.sink.expand(logits.shape[0], 1, logits.shape[2]), logits], dim=1)
        return torch.softmax(with_sink, dim=1)[:, 1:].unsqueeze(2)


class FusedFirstAttention(nn.Module):
    """Attention of the first layer, whose features are scalars: keys are known before any message of higher degree is formed.

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
        self, query: Tensor, value: Tensor, neighbors: Tensor, rows: Tensor, weights: Tensor, harmonics: Tensor, coupling: Tensor, log_cutoff: Tensor
    ) -> Tensor:
        """Query ``(n, 1, c)`` of these receivers and value ``(n_atoms, 1, c)`` to gathered messages ``(n, 9, c)``; see `FusedAttention`."""
        n, k = neighbors.shape[0], neighbors.shape[1]
        sender = value.index_select(0, neighbors.reshape(-1))  # (e, 1, c)
        orders = (self.table(rows, weights).view(-1, 3, self.channels) * sender).view(n, k, 3, self.channels)
        alpha = self.softmax(query * orders[:, :, 0], log_cutoff)
        # Y_l(u) a_l with the sum over neighbours: one small matrix product per receiver and degree.
        parts = (orders * alpha).unbind(2)
        y = harmonics.view(n, k, 9).transpose(1, 2).split([1, 3, 5], dim=1)
        return torch.cat([torch.bmm(y[0], parts[0]), torch.bmm(y[1], parts[1]), torch.bmm(y[2], parts[2])], dim=1)


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
        n_out = self.degree_out + 1
        self.sections = [n_out, n_out, n_out, 2 * self.degree_out, self.degree_out - 1]

    def forward(
        self, query: Tensor, value: Tensor, neighbors: Tensor, rows: Tensor, weights: Tensor, harmonics: Tensor, coupling: Tensor, log_cutoff: Tensor
    ) -> Tensor:
        """Gather the weighted messages of some receivers.

        Parameters
        ----------
        query : Tensor
            ``(n, components_out, c)`` of the n receivers.
        value : Tensor
            ``(n_atoms, 9, c)`` of all atoms.
        neighbors : Tensor
            ``(n, k)`` int64.
        rows, weights : Tensor
            ``(n * k, 4)`` of `SplineBasis`.
        harmonics, coupling : Tensor
            ``(n * k, 9)``, of which columns 1 to 3 are the direction, and ``(n * k, 5, 3)``.
        log_cutoff : Tensor
            ``(n, k, 1)`` logarithm of the envelope, hugely negative on padding.

        Returns
        -------
        Tensor
            ``(n, components_out, c)``.
        """
        n, k, c = neighbors.shape[0], neighbors.shape[1], self.channels
        u = harmonics[:, 1:4].unsqueeze(-1)  # (e, 3, 1)
        s, v, t = value.index_select(0, neighbors.reshape(-1)).split([1, 3, 5], dim=1)
        tu = torch.bmm(coupling.transpose(1, 2), t)
        psi0_s, psi0_v, psi0_t, psi1, psi2 = self.table(rows, weights).view(n * k, -1, c).split(self.sections, dim=1)
        orders = torch.addcmul(torch.addcmul(psi0_s * s, psi0_v, (u * v).sum(1, keepdim=True)), psi0_t, (u * tu).sum(1, keepdim=True))
        psi1 = psi1.view(n * k, self.degree_out, 2, 1, c)
        # (e, degree_out, 3, c): psi_l v + psi'_l Tu + o_l u for l = 1 and, before its coupling, l = 2.
        vectors = torch.addcmul(psi1[:, :, 0] * v.unsqueeze(1), psi1[:, :, 1], tu.unsqueeze(1))
        vectors = torch.addcmul(vectors, orders[:, 1:].unsqueeze(2), u.unsqueeze(1))
        parts = [orders[:, :1], vectors[:, 0]]
        if self.degree_out == 2:
            parts.append(torch.baddbmm(psi2 * t, coupling, vectors[:, 1]))
        messages = torch.cat(parts, dim=1).view(n, k, -1, c)
        alpha = self.softmax((query.unsqueeze(1) * messages).sum(2), log_cutoff)
        return (alpha * messages).sum(1)
