"""Sums over the processes of a distributed run; without one, of the only process there is.

Gradients are summed here and not by the hooks of `DistributedDataParallel`, which expect one backward pass in a step, whereas matching
the forces takes two.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn


def world_size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every process' tensor, the same on all of them."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total


def sum_gradients(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Replace the gradients by their sums over the processes, in one message.

    Returns
    -------
    Tensor
        () bool, whether the gradients of this process were finite before.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    if world_size() > 1:
        total = sum_over_ranks(flat)
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
    return torch.isfinite(flat).all()


def gather_from_ranks(item: Any) -> list[Any]:
    """One object of every process, in the order of the ranks, the same on all of them."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    distributed.all_gather_object(items, item)
    return items
