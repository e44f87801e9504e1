"""`validate_model` finds what it is there to find."""

import pytest

from openmm_se3.validation import validate_model
from tests.openmm_se3.physics.models import MorseWithFast, write_model


def failures(module, path):
    """Names of the checks of fast forces that fail, without the precision; and how many there are."""
    checks = [c for c in validate_model(write_model(module, path), with_openmm=False) if c.name.startswith("fast forces")]
    return {c.name.rpartition(" (")[0] for c in checks if not c.passed}, len(checks)


@pytest.mark.parametrize(
    ("swirl", "expected"),
    [
        (0.0, set()),
        # A swirl about the z axis through the first atom: no gradient, and neither rotation nor the order of atoms leaves it as it is.
        (
            200.0,
            {
                "fast forces = -dE/dx by finite differences, relative",
                "fast forces under rotation and reflection, relative",
                "fast forces under permutation, relative",
            },
        ),
    ],
)
def test_fast_forces(swirl, expected, tmp_path):
    found, n = failures(MorseWithFast(fast_swirl=swirl), tmp_path / "model.pt")
    assert n == 11
    assert found == expected
