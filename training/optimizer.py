"""Optimizer and learning-rate schedule of a run."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from training.config import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, max_steps: int) -> float:
    """Learning rate at an optimizer step: a pure function, so that a resumed run needs no scheduler state.

    ``steps``: multiplied by `drop` at each milestone (Figs. 3.2 and 3.3 of the thesis). ``warmup-cosine``: linear rise, then
    half a cosine down to `final_fraction`.
    """
    if config.schedule == "steps":
        return config.learning_rate * config.drop ** sum(step >= m for m in config.milestones)
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    x = min((step - config.warmup_steps) / max(max_steps - config.warmup_steps, 1), 1.0)
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * x)))


class MuonAndAdam(torch.optim.Optimizer):
    """Muon for the matrices of a network, Adam for all else, as one optimizer with one learning rate.

    Muon (K. Jordan et al., 2024) steps along the momentum with all its singular values made one, so that directions of small gradient learn too;
    its step is scaled to the root mean square of Adam's (J. Liu et al., arXiv:2502.16982), so that both take the same rate. Embeddings, biases,
    gains and maps to a single number are no maps between spaces and stay with Adam.

    Parameters
    ----------
    network : Module
        Whose parameters to train.
    rate : float
        Learning rate.
    """

    def __init__(self, network: nn.Module, rate: float) -> None:
        embeddings = {id(p) for m in network.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for parameter in network.parameters():
            is_map = parameter.ndim == 2 and min(parameter.shape) > 1 and id(parameter) not in embeddings
            (matrices if is_map else others).append(parameter)
        super().__init__([*matrices, *others], {"lr": rate})
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.Adam(others, lr=rate))
        self._share_groups()

    def _share_groups(self) -> None:
        """A rate that is set in `param_groups` is that of the parts."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """States of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the states of both."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


def make_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that a configuration asks for: Adam, as in the thesis, or `MuonAndAdam`."""
    if config.kind == "muon":
        return MuonAndAdam(network, config.learning_rate)
    return torch.optim.Adam(network.parameters(), lr=config.learning_rate)
