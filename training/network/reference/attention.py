"""Equations 2.3, 2.4 and 2.5, and the sum over neighbours of equation 2.8: attention with several heads."""

import math

import torch
from torch import Tensor, nn

from training.network.attention import SmoothSoftmax
from training.network.linear import EquivariantLinear
from training.network.reference.radial_kernels import RadialKernels


class ReferenceAttention(nn.Module):
    """Attention of every atom over its neighbours; each head has queries, keys and values of its own.

    The heads' results are concatenated, `num_heads` times `head_channels`, and mapped to `channels_out`. Keys and values are two sets of
    kernels (2.2) with weights of their own; their channels lie side by side in one call, which turns the features once for both.

    Parameters
    ----------
    channels_in, channels_out : tuple of int
        Channels per degree of the node features and of the result.
    head_channels : tuple of int
        Channels per degree of each head's queries, keys and values; degrees that the result lacks are left out.
    num_heads : int
        Attention heads.
    max_degree, natural_parity, n_scalars, radial_hidden
        As of `RadialKernels`.
    """

    def __init__(
        self,
        channels_in: tuple[int, ...],
        channels_out: tuple[int, ...],
        head_channels: tuple[int, ...],
        num_heads: int,
        max_degree: int,
        natural_parity: bool,
        n_scalars: int,
        radial_hidden: int,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_channels = head_channels[: len(channels_out)]
        heads = tuple(num_heads * c for c in head_channels)
        self.n_queried = min(len(channels_in), len(channels_out))  # degrees that a query can have
        self.query = EquivariantLinear(channels_in, heads[: self.n_queried], bias=False)
        keys_and_values = tuple(2 * h if degree < self.n_queried else h for degree, h in enumerate(heads))
        self.kernels = RadialKernels(channels_in, keys_and_values, max_degree, natural_parity, n_scalars, radial_hidden)
        self.softmax = SmoothSoftmax(num_heads)
        self.out = EquivariantLinear(heads, channels_out, bias=False)
        # A constant that W_Q could absorb: logits of unit size at the start.
        self.logit_scale = 1.0 / math.sqrt(sum((2 * degree + 1) * c for degree, c in enumerate(head_channels[: self.n_queried])))

    def forward(self, features: list[Tensor], neighbors: Tensor, scalars: Tensor, kernels: list[Tensor], cutoff_weight: Tensor) -> list[Tensor]:
        """Attend over the neighbours.

        Parameters
        ----------
        features : list of Tensor
            ``[(n_atoms, 2*l + 1, channels_in[l])]``.
        neighbors : Tensor
            ``(n_atoms, max_neighbors)`` int64, index of the sender.
        scalars : Tensor
            Invariants of the edges, ``(n_atoms, max_neighbors, n_scalars)``.
        kernels : list of Tensor
            Of `BasisKernels`.
        cutoff_weight : Tensor
            ``(n_atoms, max_neighbors)`` envelope, exactly 0 on padding.

        Returns
        -------
        list of Tensor
            ``[(n_atoms, 2*l + 1, channels_out[l])]``.
        """
        n, k = neighbors.shape[0], neighbors.shape[1]
        sender: list[Tensor] = []
        for f in features:
            sender.append(f.index_select(0, neighbors.reshape(-1)).view(n, k, f.shape[1], f.shape[2]))

        queries = self.query(features)  # equation 2.3: q_i = W_Q f_i, degree by degree
        messages = self.kernels(sender, scalars, kernels)
        logits = torch.zeros(n, k, self.num_heads, dtype=scalars.dtype, device=scalars.device)
        values: list[Tensor] = []
        for degree, message in enumerate(messages):
            if degree < self.n_queried:
                key, value = message.chunk(2, dim=3)  # equation 2.4: k_ij = sum_k W_K^{lk}(x_j - x_i) f_j^k
                products = (queries[degree].unsqueeze(1) * key).sum(2)
                logits = logits + products.view(n, k, self.num_heads, -1).sum(3)
                values.append(value)
            else:
                values.append(message)
        alpha = self.softmax(logits * self.logit_scale, cutoff_weight)  # equation 2.5

        attended: list[Tensor] = []
        for value in values:  # the second term of equation 2.8, head by head
            per_head = value.view(n, k, value.shape[2], self.num_heads, -1)
            attended.append((alpha.view(n, k, 1, self.num_heads, 1) * per_head).sum(1).flatten(2))
        return self.out(attended)
