"""The averaged weights that validation, test and export use."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def decay_at(n_averaged: int, decay: float) -> float:
    """Decay of the average after `n_averaged` steps: min(decay, (1 + n) / (10 + n)).

    The average then reaches back over the last tenth of the steps at most. With a decay of 0.999 from the start, a run of 1,000 steps would end with
    an average that still holds a third of its first weights.
    """
    return min(decay, (1 + n_averaged) / (10 + n_averaged))


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights of a network; `update_parameters` after each step.

    Parameters
    ----------
    network : Module
        Whose weights to average; buffers are copied.
    decay : float
        Of the old average in each step, once there have been enough of them; 0 for the last weights themselves.
    """

    @torch.no_grad()
    def update(average: Sequence[Tensor], current: Sequence[Tensor], n_averaged: Tensor | int) -> None:
        torch._foreach_lerp_(list(average), list(current), 1 - decay_at(int(n_averaged), decay))

    model = AveragedModel(network, multi_avg_fn=update)
    model.requires_grad_(False)
    return model
