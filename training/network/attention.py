"""Equivariant attention over neighbours: equations 2.2 to 2.5 with depthwise kernels in Cartesian form.

For degrees up to 2 the kernels of natural parity (l + k + J even) are 14: one per pair of degrees (l, k) and order
m = 0 .. min(l, k). Contracting the sender's features with the edge direction u gives all of them without a Clebsch-Gordan
table and without rotating into an edge frame::

    order 0:  S = [ s,  u.v,  u.(T u) ]      scalars of degree 0, 1, 2
    order 1:  V = [ v,  T u ]                vectors of degree 1, 2
    order 2:  T

    message degree 0 = psi_00 . S
    message degree 1 = psi_11 . V + (psi_10 . S) u
    message degree 2 = psi_22 T + sym0( u (x) (psi_21 . V + (psi_20 . S) u) )

with one radial weight psi(r) per path and channel; sym0 is the symmetric traceless part.
"""

import math

import torch
from torch import Tensor, nn

from training.network.linear import EquivariantLinear
from training.network.radial import RadialNetwork


class KernelMessages(nn.Module):
    """W(x_j - x_i) f_j for every edge, channel by channel (a rank-`channels` form of equations 2.1 and 2.2).

    Parameters
    ----------
    degree_in, degree_out : int
        Largest degree of the sender's features (0 or 2) and of the messages (1 or 2).
    channels : int
        Channels of every degree.
    n_basis, hidden : int
        Sizes of the radial network.
    """

    def __init__(self, degree_in: int, degree_out: int, channels: int, n_basis: int, hidden: int) -> None:
        super().__init__()
        if degree_in not in (0, 2) or degree_out not in (1, 2):
            raise ValueError(f"degree_in must be 0 or 2 and degree_out 1 or 2, got {degree_in} and {degree_out}")
        self.degree_in = degree_in
        self.degree_out = degree_out
        self.channels = channels
        n_orders = degree_out + 1
        n_paths = n_orders if degree_in == 0 else 3 * n_orders + 2 * degree_out + (degree_out - 1)
        self.radial = RadialNetwork(n_basis, hidden, n_paths, channels)

    def forward(self, sender: Tensor, basis: Tensor, direction: Tensor, coupling: Tensor) -> Tensor:
        """Compute the messages.

        Parameters
        ----------
        sender : Tensor
            Features of the senders, degrees stacked: ``(n_atoms, max_neighbors, (degree_in + 1)**2, channels)``.
        basis : Tensor
            Radial basis ``(n_atoms, max_neighbors, n_basis)``.
        direction, coupling : Tensor
            ``(n_atoms, max_neighbors, 3)`` and ``(n_atoms, max_neighbors, 5, 3)`` of `EdgeGeometry`.

        Returns
        -------
        Tensor
            ``(n_atoms, max_neighbors, (degree_out + 1)**2, channels)``.
        """
        psi = self.radial(basis)
        n_out = self.degree_out + 1
        u = direction.unsqueeze(-1)  # (n, k, 3, 1)
        # Tensors are cut with split: the backward of a slice fills a tensor of the full size with zeros, that of split does not.
        if self.degree_in == 0:
            order0 = (psi * sender).split([1] * n_out, dim=2)
            parts = [order0[0], order0[1] * u]
            if self.degree_out == 2:
                parts.append(torch.matmul(coupling, order0[2] * u))
            return torch.cat(parts, dim=2)
        s, v, t = sender.split([1, 3, 5], dim=2)
        tu = torch.matmul(coupling.transpose(-1, -2), t)  # (n, k, 3, c)
        uv = (u * v).sum(2, keepdim=True)
        utu = (u * tu).sum(2, keepdim=True)
        psi0_s, psi0_v, psi0_t, psi1, psi2 = psi.split([n_out, n_out, n_out, 2 * self.degree_out, self.degree_out - 1], dim=2)
        order0 = (psi0_s * s + psi0_v * uv + psi0_t * utu).split([1] * n_out, dim=2)
        psi1_parts = psi1.split([1] * (2 * self.degree_out), dim=2)
        parts = [order0[0], psi1_parts[0] * v + psi1_parts[1] * tu + order0[1] * u]
        if self.degree_out == 2:
            w = psi1_parts[2] * v + psi1_parts[3] * tu + order0[2] * u
            parts.append(psi2 * t + torch.matmul(coupling, w))
        return torch.cat(parts, dim=2)


class SmoothSoftmax(nn.Module):
    """alpha_ij = c_ij exp(s_ij - m_i) / (exp(b - m_i) + sum_k c_ik exp(s_ik - m_i)), equation 2.5 made smooth.

    The envelope c takes a neighbour out of numerator and denominator together; the sink exp(b), one per head, keeps the
    last neighbour's weight from staying 1 until it vanishes, and makes an isolated atom's weights an empty sum, not 0/0.
    The maximum m only guards against overflow and cancels, so it carries no gradient. It is that of the neighbours and the sink: padding, whose
    logits mean nothing, must not set it, or with large logits all others would vanish beside it and leave 0/0.

    Parameters
    ----------
    num_heads : int
        Number of attention heads.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.zeros(num_heads))

    def forward(self, logits: Tensor, cutoff_weight: Tensor) -> Tensor:
        """Logits ``(n_atoms, max_neighbors, num_heads)`` and c ``(n_atoms, max_neighbors)`` (0 on padding) to weights."""
        logits = torch.where(cutoff_weight.unsqueeze(-1) > 0, logits, self.sink)
        maximum = torch.maximum(logits.detach().amax(dim=1, keepdim=True), self.sink.detach())
        weights = cutoff_weight.unsqueeze(-1) * torch.exp(logits - maximum)
        return weights / (torch.exp(self.sink - maximum) + weights.sum(1, keepdim=True))


class EquivariantAttention(nn.Module):
    """One attention layer of the SE(3)-Transformer: queries, keys = values, smooth softmax, heads, output map.

    Keys and values share one kernel (the message); the query's linear map makes up for the shared key.

    Parameters
    ----------
    channels_in : tuple of int
        Channels per degree of the node features: ``(c0,)`` in the first layer, else ``(c0, c1, c2)``.
    channels_out : tuple of int
        Channels per degree of the result, 2 or 3 degrees.
    hidden_channels : int
        Channels of every degree inside the attention; divisible by `num_heads`.
    num_heads : int
        Attention heads.
    n_basis, radial_hidden : int
        Sizes of the radial network.
    """

    def __init__(
        self,
        channels_in: tuple[int, ...],
        channels_out: tuple[int, ...],
        hidden_channels: int,
        num_heads: int,
        n_basis: int,
        radial_hidden: int,
    ) -> None:
        super().__init__()
        if hidden_channels % num_heads:
            raise ValueError(f"hidden_channels ({hidden_channels}) must be divisible by num_heads ({num_heads})")
        self.num_heads = num_heads
        self.head_channels = hidden_channels // num_heads
        self.hidden_channels = hidden_channels
        hidden = (hidden_channels, hidden_channels, hidden_channels)
        degree_in, degree_out = len(channels_in) - 1, len(channels_out) - 1
        self.value = EquivariantLinear(channels_in, hidden[: degree_in + 1], bias=False)
        self.query = EquivariantLinear(channels_in, hidden[: min(degree_in, degree_out) + 1], bias=False)
        self.messages = KernelMessages(degree_in, degree_out, hidden_channels, n_basis, radial_hidden)
        self.softmax = SmoothSoftmax(num_heads)
        self.out = EquivariantLinear(hidden[: degree_out + 1], channels_out, bias=False)
        self.components = [1, 3, 5][: degree_out + 1]
        self.logit_scale = 1.0 / math.sqrt(self.head_channels * len(self.query.maps))

    def forward(
        self, features: list[Tensor], neighbors: Tensor, basis: Tensor, direction: Tensor, coupling: Tensor, cutoff_weight: Tensor
    ) -> list[Tensor]:
        """Attend over the neighbours.

        Parameters
        ----------
        features : list of Tensor
            ``[(n_atoms, 2*l + 1, channels_in[l])]``.
        neighbors : Tensor
            ``(n_atoms, max_neighbors)`` int64, index of the sender.
        basis, direction, coupling : Tensor
            Radial basis, directions and coupling matrices of the edges.
        cutoff_weight : Tensor
            ``(n_atoms, max_neighbors)`` envelope, exactly 0 on padding.

        Returns
        -------
        list of Tensor
            ``[(n_atoms, 2*l + 1, channels_out[l])]``.
        """
        n_atoms, max_neighbors = neighbors.shape[0], neighbors.shape[1]
        value = torch.cat(self.value(features), dim=1)  # (n, components, c)
        sender = value.index_select(0, neighbors.reshape(-1)).view(n_atoms, max_neighbors, value.shape[1], value.shape[2])
        messages = self.messages(sender, basis, direction, coupling)
        query = torch.cat(self.query(features), dim=1).unsqueeze(1)  # (n, 1, components, c)
        keyed = messages if query.shape[2] == messages.shape[2] else messages[:, :, : query.shape[2]]
        logits = (query * keyed).sum(2).view(n_atoms, max_neighbors, self.num_heads, self.head_channels).sum(-1)
        alpha = self.softmax(logits * self.logit_scale, cutoff_weight)
        per_channel = alpha.unsqueeze(-1).expand(-1, -1, -1, self.head_channels).reshape(n_atoms, max_neighbors, 1, self.hidden_channels)
        gathered = (per_channel * messages).sum(1)
        return self.out(gathered.split(self.components, dim=1))
