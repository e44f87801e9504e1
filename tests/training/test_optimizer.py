"""Learning rates, and steps of Muon beside Adam."""

import pytest
import torch
from torch import nn

from tests.training.helpers import small_network
from training.config import OptimizerConfig
from training.optimizer import MuonAndAdam, learning_rate, make_optimizer


def test_learning_rate_schedules():
    cosine = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    assert learning_rate(0, cosine, 110) == pytest.approx(0.1)
    assert learning_rate(10, cosine, 110) == pytest.approx(1.0)
    assert learning_rate(60, cosine, 110) == pytest.approx(0.55)
    assert learning_rate(110, cosine, 110) == pytest.approx(0.1)
    steps = OptimizerConfig(learning_rate=1.0, schedule="steps", milestones=(5, 8), drop=0.1)
    assert [learning_rate(s, steps, 10) for s in (0, 4, 5, 8)] == pytest.approx([1.0, 1.0, 0.1, 0.01])


def step_of(network, rate):
    """What one step changes, by name, after a gradient that hardly has a second direction."""
    optimizer = make_optimizer(network, OptimizerConfig(kind="muon"))
    for group in optimizer.param_groups:
        group["lr"] = rate
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
        if p.ndim == 2:
            scale = 10.0 ** -torch.linspace(0, 2, min(p.shape))
            u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
            p.grad = u @ (scale.unsqueeze(1) * v)
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in network.named_parameters()}


def test_matrices_step_along_all_their_directions_and_the_rest_as_adam():
    network = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 6), nn.Linear(6, 1))
    change = step_of(network, 1e-3)
    singular = torch.linalg.svdvals(change["1.weight"])
    assert singular.max() < 2.5 * singular.min()  # of the gradient it is 100
    assert 0.1e-3 < change["1.weight"].square().mean().sqrt() < 0.4e-3  # 0.2 of the rate, as Adam's in the middle of training
    for name in ("0.weight", "1.bias", "2.weight", "2.bias"):
        torch.testing.assert_close(change[name].abs(), torch.full_like(change[name], 1e-3), rtol=1e-2, atol=0.0)  # Adam's first


def test_every_parameter_of_the_network_is_trained():
    assert all(change.any() for change in step_of(small_network(), 1e-3).values())


def test_a_network_without_matrices():
    optimizer = MuonAndAdam(nn.BatchNorm1d(3), 1e-3)
    assert [type(part).__name__ for part in optimizer.parts] == ["Adam"]


def test_adam_is_the_default():
    assert type(make_optimizer(small_network(), OptimizerConfig())) is torch.optim.Adam
