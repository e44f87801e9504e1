"""`validate_model`: the contract of an exported model as an executable check.

Run by export, by the tests on every released model, and by users on theirs.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor

from openmm_se3.binding import MULTIPLE_TIME_STEPS, modes_of
from openmm_se3.errors import ModelFileError
from openmm_se3.force import create_forces
from openmm_se3.model_file import ModelMetadata, load_model
from openmm_se3.platforms import platform_names

#: Relative error of equivariance (equation 3.1 of the thesis) that each precision must stay below. In float64 it tells whether a model is
#: equivariant; in float32 it is rounding, of which a network that knows a single molecule has more on others: 2e-6 was seen.
EQUIVARIANCE_LIMIT = {torch.float32: 5e-6, torch.float64: 1e-12}
#: kJ/mol for each atom: what an error of the energy is compared with at least.
LEAST_ENERGY = 10.0
#: Largest difference between any two ways to evaluate the model, kJ/mol/nm.
AGREEMENT_LIMIT = {torch.float32: 1e-2, torch.float64: 1e-4}
#: Platforms of OpenMM on which each precision is tried, one for each: compiling the module for a Context takes most of the time.
PLATFORMS = {torch.float32: {"CPU", "CUDA"}, torch.float64: {"Reference"}}


@dataclass(frozen=True)
class Check:
    """Outcome of one check.

    Attributes
    ----------
    name : str
        What was checked.
    value, limit : float
        What was measured, and what it must not exceed.
    """

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the value is within the limit; NaN never is."""
        return self.value <= self.limit


def _random_rotation(rng: np.random.Generator, reflect: bool) -> Tensor:
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    if (np.linalg.det(q) < 0) != reflect:
        q[:, 0] *= -1
    return torch.tensor(q)


def _relative(difference: Tensor, reference: Tensor) -> float:
    """Equation 3.1: size of the difference over the size of the reference."""
    return float(difference.norm() / reference.norm().clamp_min(1e-30))


def _structure(metadata: ModelMetadata) -> tuple[Tensor, Tensor]:
    """The largest golden structure without a box, slightly distorted, so that it has no symmetry: float64 nm and numbers."""
    without_box = [g for g in metadata.golden if g.box_vectors_nm is None]
    if not without_box:
        raise ModelFileError(f"model {metadata.name!r}: none of its {len(metadata.golden)} golden structures is without a box; export it with one")
    golden = max(without_box, key=lambda g: len(g.atomic_numbers))
    x = torch.tensor(golden.positions_nm, dtype=torch.float64)
    noise = np.random.default_rng(7).normal(scale=0.002, size=tuple(x.shape))
    return x + torch.tensor(noise), torch.tensor(golden.atomic_numbers)


def _openmm_forces(
    model: torch.jit.ScriptModule, metadata: ModelMetadata, x: Tensor, z: Tensor, platform: str, mode: str, box: Tensor | None = None
) -> tuple[Tensor, str]:
    """Forces of the same structure inside OpenMM, and the kind of Force that it went through."""
    system = openmm.System()
    for _ in range(len(z)):
        system.addParticle(1.0)
    if box is not None:
        system.setDefaultPeriodicBoxVectors(*[openmm.Vec3(*row) for row in box.tolist()])
    made = create_forces(model, metadata, z.tolist(), range(len(z)), len(z), box is not None, mode, 0)
    for force in made:
        system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(platform))
    context.setPositions(x.numpy())
    state = context.getState(getForces=True)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    return torch.tensor(np.array(forces)), type(made[0]).__name__


def _conservative(model: torch.jit.ScriptModule, x: Tensor, z: Tensor, box: Tensor | None) -> Tensor:
    leaf = x.detach().clone().requires_grad_(True)
    return -torch.autograd.grad([model.energy(leaf, z, box)], [leaf])[0]


def validate_model(name_or_path: str | Path, with_openmm: bool = True) -> list[Check]:
    """Check that a model file keeps the contract.

    Parameters
    ----------
    name_or_path : str or Path
        Name of a released model, or path.
    with_openmm : bool
        Also compare with what OpenMM computes, through TorchForce or, where that cannot be used, PythonForce: on the Reference platform in double
        precision, on the CPU platform (and CUDA where it exists) in single precision.

    Returns
    -------
    list of Check
        Every check with its value and limit, passed or not.

    Raises
    ------
    ModelFileError
        If the file cannot even be opened, see `load_model`, or has no golden structure without a box, which the checks take.
    """
    model = load_model(name_or_path)
    metadata: ModelMetadata = model.metadata
    checks: list[Check] = []
    x64, z = _structure(metadata)
    edge = 4.0 * metadata.cutoff_nm
    box = torch.tensor([[edge, 0, 0], [0.2 * edge, edge, 0], [-0.3 * edge, 0.4 * edge, edge]], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        label = str(dtype).removeprefix("torch.")
        x, b = x64.to(dtype), box.to(dtype)

        def add(name: str, value: float, limit: float, label: str = label) -> None:
            checks.append(Check(f"{name} ({label})", value, limit))

        _check_form(model, x, z, add)
        _check_symmetries(model, x64, z, EQUIVARIANCE_LIMIT[dtype], add)
        _check_physics(model, x, z, b, AGREEMENT_LIMIT[dtype], add)
        if hasattr(model, "conservative_and_direct"):  # files from before the contract had it are still good
            _check_conservative(model, x, z, b, AGREEMENT_LIMIT[dtype], add)
        if hasattr(model, "fast"):
            _check_fast(model, x, z, b, EQUIVARIANCE_LIMIT[dtype], AGREEMENT_LIMIT[dtype], add)
        if metadata.n_members > 1:
            _check_deviations(model, x64, z, EQUIVARIANCE_LIMIT[dtype], add)
        if with_openmm:
            for platform in sorted(PLATFORMS[dtype] & set(platform_names())):
                _check_openmm(model, metadata, platform, x64, z, box, AGREEMENT_LIMIT[dtype], add)
    model.to(torch.float32)
    return checks


_Add = Callable[[str, float, float], None]


def _malformed(energy: Tensor, forces: Tensor, x: Tensor) -> float:
    """1 if energy or forces have not the dtype, shape and layout of the contract, else 0."""
    form = energy.dtype == torch.float64 and energy.dim() == 0 and forces.dtype == x.dtype and forces.shape == x.shape and forces.is_contiguous()
    return 0.0 if form else 1.0


def _check_form(model: torch.jit.ScriptModule, x: Tensor, z: Tensor, add: _Add) -> None:
    """Types, shapes, layout; inputs untouched; repeated calls, and a copy saved and loaded, agree."""
    before = x.clone()
    energy, forces = model(x, z)
    add("outputs have the wrong dtype, shape or layout", _malformed(energy, forces, x), 0.0)
    limit = AGREEMENT_LIMIT[x.dtype]
    worst = 0.0
    for _ in range(30):  # the interpreter optimises during the first calls; the numbers must stay
        worst = float(np.maximum(worst, float((model(x, z)[1] - forces).abs().max())))  # of which NaN is the largest, unlike in Python's
    add("calls 1 to 30 agree, kJ/mol/nm", worst, limit)
    add("inputs are changed", float((x - before).abs().max()), 0.0)
    buffer = io.BytesIO()
    torch.jit.save(model, buffer)
    buffer.seek(0)
    add("saved and loaded again, kJ/mol/nm", float((torch.jit.load(buffer)(x, z)[1] - forces).abs().max()), limit)


def _check_symmetries(model: torch.jit.ScriptModule, x: Tensor, z: Tensor, limit: float, add: _Add) -> None:
    """Rotation, reflection, translation and permutation: equation 3.1 for energies, direct and conservative forces."""
    rng = np.random.default_rng(11)
    energy, direct = model(x, z)
    gradient = _conservative(model, x, z, None)
    # Energies of atoms may cancel, since for many models what they are relative to is a fit; beside a sum near zero no error is small.
    size = energy.abs().clamp_min(LEAST_ENERGY * len(z))

    def error(moved: Tensor, numbers: Tensor, back: Callable[[Tensor], Tensor]) -> float:
        e, f = model(moved, numbers)
        g = _conservative(model, moved, numbers, None)
        return float(np.max([_relative(e - energy, size), _relative(back(f) - direct, direct), _relative(back(g) - gradient, gradient)]))

    for name, reflect in (("rotation", False), ("reflection", True)):
        worst = 0.0
        for _ in range(5):
            rotation = _random_rotation(rng, reflect).to(x.dtype)
            worst = float(np.maximum(worst, error(x @ rotation.T, z, partial(torch.matmul, other=rotation))))
        add(f"equivariance under {name}, relative", worst, limit)
    add("equivariance under translation, relative", error(x + 0.5, z, lambda f: f), limit)
    order = torch.tensor(rng.permutation(len(z)))
    add("equivariance under permutation, relative", error(x[order], z[order], lambda f: f[torch.argsort(order)]), limit)


def _check_physics(model: torch.jit.ScriptModule, x: Tensor, z: Tensor, box: Tensor, limit: float, add: _Add) -> None:
    """Isolated atoms, separated molecules, lattice translations, net force and torque."""
    energy, forces = model(x, z)
    scale = float(forces.abs().max())
    lone_energy, lone_forces = model(x[:1], z[:1])
    add("one atom: force, kJ/mol/nm", float(lone_forces.abs().max()), 0.0)
    add("one atom: energy not finite", 0.0 if bool(torch.isfinite(lone_energy)) else 1.0, 0.0)
    far = torch.cat([x, x + 100.0])
    double_energy, _ = model(far, torch.cat([z, z]))
    # At 100 nm float32 positions resolve 1e-5 nm only, which the forces turn into energy.
    slack = limit if x.dtype == torch.float64 else max(limit, 1e-5 * scale * len(z))
    add("two far molecules: energies add up, kJ/mol", abs(float(double_energy - 2 * energy)), slack)
    add("net force, kJ/mol/nm", float(forces.sum(0).abs().max()), limit * 0.1 * len(z))
    torque = torch.linalg.cross((x - x.mean(0)).double(), forces.double()).sum(0)
    add("net torque, kJ/mol", float(torque.abs().max()), limit * 0.1 * len(z))
    periodic_energy, periodic_forces = model(x, z, box)
    rng = np.random.default_rng(3)
    shifts = torch.tensor(rng.integers(-2, 3, size=tuple(x.shape)), dtype=x.dtype) @ box
    moved_energy, moved_forces = model(x + shifts, z, box)
    tolerance = limit if x.dtype == torch.float64 else max(limit, 1e-5 * scale * len(z))
    add("atoms moved by lattice vectors: energy, kJ/mol", abs(float(moved_energy - periodic_energy)), tolerance)
    add("atoms moved by lattice vectors: forces, kJ/mol/nm", float((moved_forces - periodic_forces).abs().max()), 1e3 * tolerance)
    add("in a large box as without: energy, kJ/mol", abs(float(periodic_energy - energy)), limit)


def _check_conservative(model: torch.jit.ScriptModule, x: Tensor, z: Tensor, box: Tensor, limit: float, add: _Add) -> None:
    """The model's own gradient against autograd's; direct forces and energy as from `forward`; one atom alone."""
    for name, cell in (("", None), (" in a box", box)):
        energy, forces = model(x, z, cell)
        expected = _conservative(model, x, z, cell)
        worst = torch.zeros(3, dtype=torch.float64)
        for _ in range(3):
            got = model.conservative_and_direct(x, z, cell)
            errors = [(got[0] - energy).abs(), (got[1] - expected).abs().max(), (got[2] - forces).abs().max()]
            worst = torch.maximum(worst, torch.stack([e.to(torch.float64) for e in errors]))
        add(f"conservative forces{name} = -dE/dx by autograd, kJ/mol/nm", float(worst[1]), limit)
        add(f"energy{name}, with conservative forces or without, kJ/mol", float(worst[0]), limit)
        add(f"direct forces{name}, with conservative forces or without, kJ/mol/nm", float(worst[2]), limit)
    add("one atom: conservative force, kJ/mol/nm", float(model.conservative_and_direct(x[:1], z[:1])[1].abs().max()), 0.0)


def _check_fast(model: torch.jit.ScriptModule, x: Tensor, z: Tensor, box: Tensor, limit: float, agreement: float, add: _Add) -> None:
    """The fast network: form, symmetries, isolated atoms, a large box, forces that are the gradient of its energy."""
    energy, forces = model.fast(x, z)
    add("fast forces: outputs have the wrong dtype, shape or layout", _malformed(energy, forces, x), 0.0)
    rng = np.random.default_rng(17)
    rotation = _random_rotation(rng, True).to(x.dtype)
    turned_energy, turned = model.fast(x @ rotation.T, z)
    error = float(np.max([_relative(turned_energy - energy, energy), _relative(turned @ rotation - forces, forces)]))
    add("fast forces under rotation and reflection, relative", error, limit)
    order = torch.tensor(rng.permutation(len(z)))
    add("fast forces under permutation, relative", _relative(model.fast(x[order], z[order])[1] - forces[order], forces), limit)
    add("fast forces: one atom, kJ/mol/nm", float(model.fast(x[:1], z[:1])[1].abs().max()), 0.0)
    add("fast forces in a large box as without, kJ/mol/nm", float((model.fast(x, z, box)[1] - forces).abs().max()), agreement)
    if x.dtype == torch.float64:  # float32 has not the digits for a difference
        step = 1e-6  # nm
        direction = torch.tensor(rng.normal(size=tuple(x.shape)))
        slope = (model.fast(x + step * direction, z)[0] - model.fast(x - step * direction, z)[0]) / (2 * step)
        add("fast forces = -dE/dx by finite differences, relative", _relative(slope + (forces * direction).sum(), forces), 1e-6)


def _check_openmm(
    model: torch.jit.ScriptModule, metadata: ModelMetadata, platform: str, x: Tensor, z: Tensor, box: Tensor, limit: float, add: _Add
) -> None:
    """The forces inside OpenMM: without a box, and in one with the atoms scattered over its images."""
    scattered = x + torch.tensor(np.random.default_rng(19).integers(-1, 2, size=tuple(x.shape)), dtype=x.dtype) @ box
    modes = modes_of(model)
    cases: list[tuple[str, str, Tensor, Tensor | None]] = [(mode, "", x, None) for mode in modes]
    cases += [(mode, " in a box", scattered, box) for mode in modes if mode not in MULTIPLE_TIME_STEPS]
    for mode, where, positions, cell in cases:
        # OpenMM hands over float64 positions on the CPU, so compare with the same.
        expected = model(positions, z, cell)[1] if mode == "direct" else _conservative(model, positions, z, cell)
        got, backend = _openmm_forces(model, metadata, positions, z, platform, mode, cell)
        # On a GPU in single precision positions themselves carry float32's resolution, which is coarser for those far from the origin.
        allowed = limit if platform != "CUDA" else 0.1 if cell is None else 1.0
        add(f"OpenMM {platform}, {backend} = torch, {mode} forces{where}, kJ/mol/nm", float((got - expected).abs().max()), allowed)


def _check_deviations(model: torch.jit.ScriptModule, x: Tensor, z: Tensor, limit: float, add: _Add) -> None:
    """A committee's deviations: form, invariance, the same atoms in another order."""
    deviations = model.deviations(x, z)
    form = deviations.dtype == x.dtype and deviations.shape == z.shape and bool((deviations >= 0).all()) and float(deviations.max()) > 0
    add("deviations have the wrong dtype or shape, or are all zero", 0.0 if form else 1.0, 0.0)
    # The members' forces are rounded, not their difference, which may be far smaller.
    scale = model(x, z)[1].norm() / deviations.norm().clamp_min(1e-30)
    rng = np.random.default_rng(13)
    rotation = _random_rotation(rng, True).to(x.dtype)
    add(
        "deviations under rotation and reflection, relative",
        _relative(model.deviations(x @ rotation.T, z) - deviations, deviations),
        limit * float(1 + scale),
    )
    order = torch.tensor(rng.permutation(len(z)))
    add(
        "deviations under permutation, relative",
        _relative(model.deviations(x[order], z[order]) - deviations[order], deviations),
        limit * float(1 + scale),
    )
