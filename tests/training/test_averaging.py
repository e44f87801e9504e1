"""Averaged weights: against the sum written out, and in runs that are short beside the decay."""

import pytest
from torch import nn

from training.averaging import averaged, decay_at


def after(steps, decay):
    """The average of a weight that is 0, 1, 2, ... after each step."""
    network = nn.Linear(1, 1, bias=False).double()
    model = averaged(network, decay)
    for step in range(steps):
        nn.init.constant_(network.weight, float(step))
        model.update_parameters(network)
    return float(model.module.weight.detach())


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_average_is_that_of_the_recurrence(decay):
    expected = 0.0
    for step in range(1, 200):
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * step
    assert after(200, decay) == pytest.approx(expected, rel=1e-12)


def test_long_runs_have_the_decay_asked_for():
    assert decay_at(100_000, 0.999) == 0.999
    assert after(3000, 0.99) == pytest.approx(2999 - 0.99 / 0.01, abs=1e-3)  # a ramp lags by decay / (1 - decay)


@pytest.mark.parametrize("steps", [20, 200, 2000])
def test_short_runs_end_near_their_last_weights(steps):
    assert after(steps, 0.999) > 0.85 * (steps - 1)


def test_without_decay_the_last_weights_remain():
    assert after(7, 0.0) == 6.0


def test_averages_are_not_trained():
    assert not any(p.requires_grad for p in averaged(nn.Linear(2, 2), 0.9).parameters())
