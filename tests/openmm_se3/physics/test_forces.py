"""Measures of a force field as such: is it a gradient, and by how much is it not."""

from types import SimpleNamespace

import numpy as np
import pytest

from openmm_se3.physics.asymmetry import asymmetry
from openmm_se3.physics.gradient import gradient_error, measure_gradient
from openmm_se3.physics.loop_work import loop_work
from openmm_se3.physics.settings import QUICK
from tests.openmm_se3.physics.models import random_matrix


def energy(x):
    """Of order 1000 kJ/mol with a length scale of 0.05 nm."""
    return float(1000 * np.sum(np.sin(x / 0.05) * np.roll(np.cos(x / 0.05), 1)))


def force(x):
    s, c = np.sin(x / 0.05), np.cos(x / 0.05)
    # Roll moves element j to j + 1: cos of j stands beside sin of j + 1.
    return -1000 / 0.05 * (c * np.roll(c, 1) - s * np.roll(s, -1))


X = np.random.default_rng(1).normal(scale=0.1, size=(4, 3))


class TestGradient:
    def test_true_gradient(self):
        assert gradient_error(energy, force, X) < 1e-8

    @pytest.mark.parametrize("error", [1e-2, 1e-5])
    def test_a_wrong_force_is_found_in_its_size(self, error):
        assert gradient_error(energy, lambda x: (1 + error) * force(x), X) == pytest.approx(error, rel=1e-2)

    def test_an_energy_that_is_not_finite_is_no_gradient(self):
        assert np.isnan(gradient_error(lambda x: np.nan if x[0, 0] > X[0, 0] + 9e-5 else energy(x), force, X))

    @pytest.mark.parametrize("bad", [0, 1])
    def test_one_frame_that_is_not_a_number_misses(self, bad):
        """Whether it is the first or not."""
        frames = [X + 0.01, X - 0.01]
        subject = SimpleNamespace(
            minimum=lambda name: SimpleNamespace(symbols=[]),
            surface=lambda symbols: SimpleNamespace(energy=energy, conservative=lambda x: np.full_like(x, np.nan) if x is frames[bad] else force(x)),
            thermal_frames=lambda *_: frames,
        )
        (quantity,) = measure_gradient(subject, QUICK).quantities
        assert quantity.verdict == "missed"


class TestAsymmetry:
    def test_limits(self):
        m = random_matrix(6)
        assert asymmetry(m + m.T) == 0.0
        assert asymmetry(m - m.T) == pytest.approx(1.0)

    def test_known_mixture(self):
        m = random_matrix(6)
        s, a = (m + m.T) / 2, (m - m.T) / 2
        s, a = s / np.linalg.norm(s), a / np.linalg.norm(a)
        # The two parts are orthogonal: |S + t A|^2 = 1 + t^2.
        assert asymmetry(s + 0.05 * a) == pytest.approx(0.05 / np.sqrt(1 + 0.05**2))


class TestLoopWork:
    def test_linear_force(self):
        """Around u cos t + v sin t the work of F = J x is pi (v J u - u J v)."""
        j = random_matrix(6)
        rng = np.random.default_rng(2)
        center, u, v = rng.normal(size=(3, 2, 3))
        work, _, traffic = loop_work(lambda x: (j @ x.reshape(-1)).reshape(-1, 3), center, u, v)
        expected = np.pi * (v.reshape(-1) @ j @ u.reshape(-1) - u.reshape(-1) @ j @ v.reshape(-1))
        assert abs(expected) > 1
        assert work == pytest.approx(expected)
        assert traffic >= abs(work)

    def test_length_of_a_circle(self):
        u, v = np.zeros((2, 1, 3))
        u[0, 0] = v[0, 1] = 0.3
        assert loop_work(lambda x: x, np.zeros((1, 3)), u, v)[1] == pytest.approx(2 * np.pi * 0.3)

    def test_a_gradient_does_no_work(self):
        u, v = np.random.default_rng(3).normal(scale=0.005, size=(2, 4, 3))
        work, _, traffic = loop_work(force, X, u, v)
        assert traffic > 10
        assert abs(work) < 1e-9 * traffic
