"""Constants that stay exact when a module changes its precision."""

import torch
from torch import Tensor, nn


class ExactConstant(nn.Module):
    """A float64 constant kept as whole numbers of 2**-52.

    A floating-point buffer follows its module: made in float32, or converted to it once, it would carry a rounding of 1e-8 into float64, and
    the equivariance of the network with it. Integers are left alone.

    Parameters
    ----------
    values : Tensor
        float64, any shape, magnitudes below 1024.
    """

    units: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("units", torch.round(values.to(torch.float64) * 2.0**52).to(torch.int64))

    def forward(self, like: Tensor) -> Tensor:
        """The constant in the dtype of `like`."""
        return (self.units.to(torch.float64) * 2.0**-52).to(like.dtype)
