"""Equation 2.8: one layer of the SE(3)-Transformer."""

from torch import Tensor, nn

from training.network.reference.attention import ReferenceAttention
from training.network.reference.self_interaction import ReferenceSelfInteraction


class ReferenceLayer(nn.Module):
    """Equation 2.8: f_out_i^l = W_V^{ll} f_i^l + sum_k sum_j alpha_ij W_V^{lk}(x_j - x_i) f_j^k.

    The first term is the attentive self-interaction (2.6, 2.7), the second comes from several heads.

    Parameters
    ----------
    channels_in, channels_out : tuple of int
        Channels per degree.
    head_channels, num_heads, max_degree, natural_parity, n_scalars, radial_hidden
        As of `ReferenceAttention`.
    hidden : int
        Width of the networks of the self-interaction.
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
        hidden: int,
    ) -> None:
        super().__init__()
        self.attention = ReferenceAttention(channels_in, channels_out, head_channels, num_heads, max_degree, natural_parity, n_scalars, radial_hidden)
        self.self_interaction = ReferenceSelfInteraction(channels_in, channels_out, hidden)

    def forward(self, features: list[Tensor], neighbors: Tensor, scalars: Tensor, kernels: list[Tensor], cutoff_weight: Tensor) -> list[Tensor]:
        """Arguments and result as in `ReferenceAttention.forward`."""
        own = self.self_interaction(features)
        attended = self.attention(features, neighbors, scalars, kernels, cutoff_weight)
        out: list[Tensor] = []
        for degree, f in enumerate(attended):
            out.append(own[degree] + f if degree < len(own) else f)  # equation 2.8
        return out
