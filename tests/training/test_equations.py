"""The thesis' equations can be found by their numbers, in the code and in a test that holds them to loops; here those of the loss and the error.

The others are in `test_reference`.
"""

import re
from pathlib import Path

import pytest
import torch

import training.network.reference
from openmm_se3.validation import _relative
from tests.training.helpers import equivariance_error
from training.config import LossConfig
from training.data.batches import Batch
from training.loss import EnergyForceLoss

ROOT = Path(__file__).parent.parent.parent
# Where the reader is led to: the table in the docstring of the reference form, and the two equations that are no layer's.
FILES = dict(re.findall(r"^equation (2\.\d) +`(\w+)`", training.network.reference.__doc__, re.MULTILINE))
CODE = {number: f"training/network/reference/{name}.py" for number, name in FILES.items()}
CODE |= {"3.1": "openmm_se3/validation.py", "3.2": "training/loss.py"}
TESTS = "".join((Path(__file__).parent / name).read_text() for name in ("test_reference.py", "test_equations.py"))


def test_all_equations_are_in_the_table():
    assert list(CODE) == [*(f"2.{n}" for n in range(1, 10)), "3.1", "3.2"]


@pytest.mark.parametrize("number", CODE)
def test_searching_for_a_number_leads_to_code_and_test(number):
    mention = re.compile(rf"[Ee]quation {re.escape(number)}\b")
    assert mention.search((ROOT / CODE[number]).read_text())
    assert mention.search(TESTS)


def test_error_by_hand():
    """Equation 3.1: |got - expected| / |expected|, here |(0, 0, 1)| / |(2, 1, 2)| and |(0.3, 0.4)| / |(3, 4)|."""
    got, expected = torch.tensor([2.0, 1.0, 3.0]), torch.tensor([2.0, 1.0, 2.0])
    assert _relative(got - expected, expected) == pytest.approx(1 / 3)
    more = [torch.tensor([3.3, 4.4]), torch.tensor([3.0, 4.0])]
    assert equivariance_error([got, more[0]], [expected, more[1]]) == pytest.approx(1 / 3)
    assert equivariance_error(more[:1], more[1:]) == pytest.approx(0.1)


def test_loss_by_loops():
    """Equation 3.2: molecules of 1 and 3 atoms, energies over s_E^2 and the number of atoms, components of forces over s_F^2."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 3]
    energies, labels = torch.randn(2, 2, generator=generator, dtype=torch.float64)
    direct, conservative, forces = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64)
    nothing = torch.zeros(4, 1, dtype=torch.int64)
    batch = Batch(
        species=nothing.view(-1),
        positions=torch.zeros(4, 3),
        neighbors=nothing,
        mask=nothing.bool(),
        molecule=torch.tensor([0, 1, 1, 1]),
        n_atoms_of=torch.tensor(sizes),
        energies=labels,
        forces=forces,
        frames=torch.arange(2),
    )
    w_e, w_f, w_c, s_e, s_f = 0.3, 0.5, 0.7, 0.4, 1.4
    config = LossConfig(energy_weight=w_e, force_weight=w_f, conservative_weight=w_c)
    got = EnergyForceLoss(config, s_e, s_f).per_molecule(energies, direct, conservative, batch).mean()
    of_energies = sum(float(energies[m] - labels[m]) ** 2 / s_e**2 / sizes[m] for m in range(2)) / 2
    of_forces = [sum(float(f[a, c] - forces[a, c]) ** 2 / s_f**2 for a in range(4) for c in range(3)) / 12 for f in (direct, conservative)]
    assert float(got) == pytest.approx(w_e * of_energies + w_f * of_forces[0] + w_c * of_forces[1])
