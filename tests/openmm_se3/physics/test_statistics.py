"""Errors of correlated series against an autoregressive process, whose answer is known."""

import numpy as np
import pytest

from openmm_se3.physics.statistics import mean_with_error, slope_with_error, statistical_inefficiency


def autoregressive(rho, n, seed):
    """x_t = rho x_{t-1} + noise, of unit variance."""
    noise = np.random.default_rng(seed).normal(size=n) * np.sqrt(1 - rho**2)
    x = np.zeros(n)
    for t in range(1, n):
        x[t] = rho * x[t - 1] + noise[t]
    return x


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_inefficiency(rho):
    assert statistical_inefficiency(autoregressive(rho, 20000, 0)) == pytest.approx((1 + rho) / (1 - rho), rel=0.25, abs=0.1)


def test_inefficiency_of_a_constant_is_one():
    assert statistical_inefficiency(np.full(50, 3.7)) == 1.0


def test_errors_are_those_of_many_repetitions():
    time = np.arange(2000.0)
    series = [autoregressive(0.8, len(time), seed) for seed in range(40)]
    means, mean_errors = np.array([mean_with_error(x) for x in series]).T
    slopes, slope_errors = np.array([slope_with_error(time, 0.01 * time + x) for x in series]).T
    assert np.mean(mean_errors) == pytest.approx(np.std(means), rel=0.35)
    assert np.mean(slope_errors) == pytest.approx(np.std(slopes), rel=0.35)
    assert np.mean(slopes) == pytest.approx(0.01, abs=3 * np.std(slopes) / np.sqrt(len(series)))


def test_too_few_samples_have_no_error_bar():
    assert mean_with_error(np.ones(1)) == (1.0, float("inf"))
    slope, error = slope_with_error(np.arange(3.0), np.arange(3.0))
    assert np.isnan(slope)
    assert error == float("inf")
