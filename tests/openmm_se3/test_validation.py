"""`validate_model` finds what it is there to find."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from openmm_se3 import validation
from openmm_se3.errors import ModelFileError
from openmm_se3.model_file import load_model, read_metadata
from openmm_se3.validation import EQUIVARIANCE_LIMIT, Check, _check_fast, _check_symmetries, validate_model
from tests.openmm_se3.helpers import ethanol, numbers
from tests.openmm_se3.physics.models import Morse, MorseWithFast, write_model


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


class AtZero(Morse):
    """Its energy is relative to that of one structure."""

    def __init__(self, x, z):
        super().__init__()
        self.zero = super().energy(x, z)

    def forward(self, positions, atomic_numbers, box_vectors=None):
        energy, forces = super().forward(positions, atomic_numbers, box_vectors)
        return energy - self.zero, forces


def test_an_energy_near_zero_is_no_fault():
    topology, positions = ethanol()
    x, z, found = torch.tensor(positions), numbers(topology), {}
    _check_symmetries(AtZero(x, z), x.float(), z, EQUIVARIANCE_LIMIT[torch.float32], lambda name, value, limit: found.update({name: value / limit}))
    assert len(found) == 4
    assert max(found.values()) < 1


class Faulty(torch.nn.Module):
    """Pairs that repel within 0.3 nm, E = 100 (1 - r^2 / 0.09)^3, to the contract but for one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.register_buffer("calls", torch.zeros(()))

    def pairs(self, positions: torch.Tensor, box_vectors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Energy of every pair, and the force on its first atom."""
        x = positions.to(torch.float64)
        d = x.unsqueeze(1) - x.unsqueeze(0)
        if box_vectors is not None and self.fault != "box":
            box = box_vectors.to(torch.float64)
            for k in (2, 1, 0):
                d = d - torch.round(d[..., k : k + 1] / box[k, k]) * box[k]
        others = 1.0 - torch.eye(x.shape[0], dtype=torch.float64)
        inside = (1.0 - d.square().sum(-1) / 0.09).clamp_min(0.0) * others
        energy, force = 100.0 * inside.pow(3), (600.0 / 0.09) * inside.square().unsqueeze(-1) * d
        if self.fault == "range":
            energy = energy + others
        return energy, force

    @torch.jit.export
    def energy(self, positions: torch.Tensor, atomic_numbers: torch.Tensor, box_vectors: torch.Tensor | None = None) -> torch.Tensor:
        energy = 0.5 * self.pairs(positions, box_vectors)[0].sum()
        if self.fault == "place":
            energy = energy + 50.0 * positions.to(torch.float64)[:, 0].square().sum()
        return energy.to(torch.float32) if self.fault == "form" else energy

    def forward(
        self, positions: torch.Tensor, atomic_numbers: torch.Tensor, box_vectors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        forces = self.pairs(positions, box_vectors)[1].sum(1)
        if self.fault == "push":
            forces = forces + torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        if self.fault == "twist":
            x = positions.to(torch.float64) - positions.to(torch.float64).mean(0)
            forces = forces + 100.0 * torch.stack([-x[:, 1], x[:, 0], torch.zeros_like(x[:, 0])], dim=1)
        if self.fault == "order":
            forces = torch.cat([1.1 * forces[:1], forces[1:]])
        if self.fault == "memory":
            self.calls.add_(1.0)
            if float(self.calls) > 8.0 and float(self.calls) % 7.0 == 0.0:
                forces = 1.1 * forces
        if self.fault == "number":
            self.calls.add_(1.0)
            if float(self.calls) > 8.0:
                forces = 0.0 * forces / 0.0
        if self.fault == "alone" and positions.shape[0] == 1:
            forces = forces + positions.to(torch.float64)
        energy, forces = self.energy(positions, atomic_numbers, box_vectors), forces.to(positions.dtype).contiguous()
        if self.fault == "inputs":
            with torch.no_grad():
                positions[0, 0] += 1e-8
        return energy, forces

    @torch.jit.export
    def energy_and_forces(
        self, positions: torch.Tensor, atomic_numbers: torch.Tensor, box_vectors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.energy(positions, atomic_numbers, box_vectors), self.forward(positions.detach(), atomic_numbers, box_vectors)[1]

    @torch.jit.export
    def conservative_and_direct(
        self, positions: torch.Tensor, atomic_numbers: torch.Tensor, box_vectors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        energy, direct = self.forward(positions.detach(), atomic_numbers, box_vectors)
        conservative = self.pairs(positions.detach(), box_vectors)[1].sum(1).to(positions.dtype)
        if self.fault == "gradient":
            conservative = 1.001 * conservative
        if self.fault == "other":
            direct = 1.001 * direct
        return energy, conservative, direct


FIXED_AXIS = {"equivariance under rotation", "equivariance under reflection"}


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("none", set()),
        ("form", {"outputs have the wrong dtype, shape or layout"}),
        ("order", {"equivariance under permutation", "net force"}),
        ("push", {*FIXED_AXIS, "one atom: force", "net force"}),
        # It turns about the middle of all atoms, which lattice vectors move.
        ("twist", {*FIXED_AXIS, "net torque", "atoms moved by lattice vectors: forces"}),
        ("alone", {"one atom: force"}),
        ("range", {"two far molecules: energies add up"}),
        ("box", {"atoms moved by lattice vectors: energy", "atoms moved by lattice vectors: forces"}),
        ("gradient", {"conservative forces = -dE/dx by autograd", "conservative forces in a box = -dE/dx by autograd"}),
        ("other", {"direct forces, with conservative forces or without", "direct forces in a box, with conservative forces or without"}),
    ],
)
def test_every_fault_is_found(fault, expected, tmp_path):
    """And nothing else is: each check tells what it says."""
    checks = validate_model(write_model(Faulty(fault), tmp_path / "model.pt"), with_openmm=False)
    for precision in ("float32", "float64"):
        failed = [c.name for c in checks if not c.passed and precision in c.name]
        assert {
            name.rpartition(" (")[0].removesuffix(", relative").removesuffix(", kJ/mol/nm").removesuffix(", kJ/mol") for name in failed
        } == expected


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("memory", {"calls 1 to 30 agree, kJ/mol/nm"}),
        (
            "number",
            {"calls 1 to 30 agree, kJ/mol/nm"}
            | {f"equivariance under {m}, relative" for m in ("rotation", "reflection", "translation", "permutation")},
        ),
        ("inputs", {"inputs are changed"}),
        ("place", {"equivariance under translation, relative", "conservative forces = -dE/dx by autograd, kJ/mol/nm"}),
    ],
)
def test_faults_that_spread(fault, expected, tmp_path):
    """What spoils other checks too is named among them."""
    checks = validate_model(write_model(Faulty(fault), tmp_path / "model.pt"), with_openmm=False)
    for precision in ("float32", "float64"):
        assert expected <= {c.name.rpartition(" (")[0] for c in checks if not c.passed and precision in c.name}


def test_fast_forces_that_are_no_numbers():
    """Beside an energy that is one."""
    x, found = torch.rand(3, 3, dtype=torch.float64), {}
    model = SimpleNamespace(fast=lambda x, z, box=None: (torch.ones((), dtype=torch.float64), torch.full_like(x, torch.nan)))
    _check_fast(model, x, torch.ones(3, dtype=torch.int64), None, 1.0, 1.0, lambda *row: found.update({row[0]: Check(*row)}))
    assert [name for name, check in found.items() if check.passed] == ["fast forces: outputs have the wrong dtype, shape or layout"]


class TestInsideOpenMM:
    MODES = ("direct forces", "conservative forces", "direct forces in a box", "conservative forces in a box", "mts forces")

    @staticmethod
    def checks(path, backend):
        found = [c for c in validate_model(path) if f"Reference, {backend}" in c.name]
        return {c.name.rpartition(f"{backend} = torch, ")[2].partition(", ")[0]: c.passed for c in found}

    @pytest.mark.parametrize("backend", ["TorchForce", "PythonForce"])
    def test_each_backend_by_its_name(self, backend, tmp_path, monkeypatch):
        monkeypatch.setattr("openmm_se3.force._choose_backend", lambda: backend)
        assert self.checks(write_model(Faulty("none"), tmp_path / "model.pt"), backend) == dict.fromkeys(self.MODES, True)

    def test_a_box_that_is_not_handed_on_is_found(self, tmp_path, monkeypatch):
        made = validation.create_forces
        monkeypatch.setattr(validation, "create_forces", lambda *a: made(*a[:5], False, *a[6:]))
        found = self.checks(write_model(Faulty("none"), tmp_path / "model.pt"), "TorchForce")
        assert found == {mode: "in a box" not in mode for mode in self.MODES}


def test_no_golden_structure_without_a_box(tmp_path, monkeypatch):
    path = write_model(Morse(), tmp_path / "model.pt")
    module = load_model(path)
    module.metadata = replace(read_metadata(path), golden=[])
    monkeypatch.setattr("openmm_se3.validation.load_model", lambda name: module)
    with pytest.raises(ModelFileError, match="model 'model': none of its 0 golden structures is without a box; export it with one"):
        validate_model(path)
