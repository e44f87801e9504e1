"""Equivariant linear map: channels of one degree mix among themselves, components never (Schur's lemma)."""

import torch
from torch import Tensor, nn


class EquivariantLinear(nn.Module):
    """One matrix over channels per degree; a bias only for degree 0, where it is invariant.

    Parameters
    ----------
    channels_in, channels_out : sequence of int
        Channels per degree 0, 1, ...; degrees that only one side has are dropped.
    bias : bool
        Whether degree 0 gets a bias.
    """

    def __init__(self, channels_in: tuple[int, ...], channels_out: tuple[int, ...], bias: bool = True) -> None:
        super().__init__()
        pairs = list(zip(channels_in, channels_out, strict=False))
        self.maps = nn.ModuleList(nn.Linear(c_in, c_out, bias=bias and degree == 0) for degree, (c_in, c_out) in enumerate(pairs))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Map features ``[(n_atoms, 2*l + 1, channels_in[l])]`` to ``[(n_atoms, 2*l + 1, channels_out[l])]``."""
        out: list[Tensor] = []
        for degree, linear in enumerate(self.maps):
            out.append(linear(features[degree]))
        return out


def invariant_products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Scalar products f_c . g_c over the components of each degree, degrees side by side.

    Parameters
    ----------
    left, right : list of Tensor
        ``(n_atoms, 2*l + 1, channels_l)`` each.

    Returns
    -------
    Tensor
        ``(n_atoms, sum(channels_l))``, scaled so that each entry is of the order of a squared component.
    """
    products: list[Tensor] = []
    for a, b in zip(left, right):  # noqa: B905 - TorchScript knows no strict=
        products.append((a * b).mean(1))
    return torch.cat(products, dim=-1)
