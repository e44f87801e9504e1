"""Model files with known physics, for measures to find."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ase.data import covalent_radii

from openmm_se3.model_file import (
    CHECKSUM_FILE,
    FORMAT_VERSION,
    METADATA_FILE,
    GoldenStructure,
    ModelMetadata,
    metadata_to_json,
    text_sha256,
    weights_sha256,
)

CUTOFF_NM = 0.3


class _Model(torch.nn.Module):
    """What the contract asks for besides `forward` and `energy`."""

    @torch.jit.export
    def energy_and_forces(
        self, positions: torch.Tensor, atomic_numbers: torch.Tensor, box_vectors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            _, forces = self.forward(positions, atomic_numbers, box_vectors)
        return self.energy(positions, atomic_numbers, box_vectors), forces


class Trap(_Model):
    """Every atom in a harmonic trap about the origin; the direct forces also swirl about the z axis, which no energy describes."""

    def __init__(self, stiffness: float, swirl: float) -> None:
        super().__init__()
        self.stiffness = stiffness
        self.register_buffer("turn", swirl * torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))

    def forward(
        self, positions: torch.Tensor, atomic_numbers: torch.Tensor, box_vectors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        forces = -self.stiffness * positions + positions @ self.turn.to(positions.dtype).t()
        return self.energy(positions, atomic_numbers, box_vectors), forces.contiguous()

    @torch.jit.export
    def energy(self, positions: torch.Tensor, atomic_numbers: torch.Tensor, box_vectors: torch.Tensor | None = None) -> torch.Tensor:
        return 0.5 * self.stiffness * positions.to(torch.float64).square().sum()


class Morse(_Model):
    """A Morse curve between all pairs, its well at the sum of the covalent radii; faded out at the cutoff, or cut off there.

    The direct forces are the exact ones plus a swirl about the z axis through the first atom.
    """

    def __init__(self, depth: float = 400.0, steepness: float = 25.0, swirl: float = 0.0, smooth: bool = True) -> None:
        super().__init__()
        self.depth, self.steepness, self.swirl, self.smooth = depth, steepness, swirl, smooth
        self.cutoff = CUTOFF_NM
        self.register_buffer("radii", (torch.tensor(covalent_radii) / 10).float())

    def pairs(self, positions: torch.Tensor, atomic_numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Energy and slope of each pair, and unit vectors from the first index to the second."""
        x = positions.to(torch.float64)
        separate = 1.0 - torch.eye(x.shape[0], dtype=torch.float64)
        d = x.unsqueeze(0) - x.unsqueeze(1)
        r = (d.square().sum(-1) + 1.0 - separate).sqrt()
        radius = self.radii.to(torch.float64)[atomic_numbers]
        fall = torch.exp(-self.steepness * (r - radius.unsqueeze(0) - radius.unsqueeze(1)))
        energy = self.depth * ((1 - fall).square() - 1)
        slope = 2 * self.depth * self.steepness * fall * (1 - fall)
        inside = (r < self.cutoff).to(torch.float64) * separate
        u = (r / self.cutoff).clamp(max=1.0)
        if self.smooth:
            envelope = 1 - 28 * u.pow(6) + 48 * u.pow(7) - 21 * u.pow(8)
            slope = slope * envelope - energy * 168 * u.pow(5) * (1 - u).square() / self.cutoff
            energy = energy * envelope
        return energy * inside, slope * inside, d / r.unsqueeze(-1)

    def forward(
        self, positions: torch.Tensor, atomic_numbers: torch.Tensor, box_vectors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        energy, slope, direction = self.pairs(positions, atomic_numbers)
        forces = (slope.unsqueeze(-1) * direction).sum(1)
        x = positions.to(torch.float64) - positions[:1].to(torch.float64)
        forces = forces + self.swirl * torch.stack([-x[:, 1], x[:, 0], torch.zeros_like(x[:, 0])], dim=1)
        return 0.5 * energy.sum(), forces.to(positions.dtype).contiguous()

    @torch.jit.export
    def energy(self, positions: torch.Tensor, atomic_numbers: torch.Tensor, box_vectors: torch.Tensor | None = None) -> torch.Tensor:
        return 0.5 * self.pairs(positions, atomic_numbers)[0].sum()


class MorseWithGradient(Morse):
    """`Morse` with the method that gives the gradient of the energy without autograd, which the contract came to have later."""

    @torch.jit.export
    def conservative_and_direct(
        self, positions: torch.Tensor, atomic_numbers: torch.Tensor, box_vectors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _, slope, direction = self.pairs(positions, atomic_numbers)
        energy, forces = self.forward(positions, atomic_numbers, box_vectors)
        return energy, (slope.unsqueeze(-1) * direction).sum(1).to(positions.dtype).contiguous(), forces


class MorseWithFast(MorseWithGradient):
    """The same with fast forces: those of a shallower curve, or, to be refused, with a swirl that no energy describes."""

    def __init__(self, depth: float = 400.0, fast_depth: float = 300.0, fast_swirl: float = 0.0, **rest: float) -> None:
        super().__init__(depth, **rest)
        self.share, self.fast_swirl = fast_depth / depth, fast_swirl

    @torch.jit.export
    def fast(
        self, positions: torch.Tensor, atomic_numbers: torch.Tensor, box_vectors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        energy, slope, direction = self.pairs(positions, atomic_numbers)
        x = positions.to(torch.float64) - positions[:1].to(torch.float64)
        swirl = self.fast_swirl * torch.stack([-x[:, 1], x[:, 0], torch.zeros_like(x[:, 0])], dim=1)
        forces = self.share * (slope.unsqueeze(-1) * direction).sum(1) + swirl
        return 0.5 * self.share * energy.sum(), forces.to(positions.dtype).contiguous()


def write_model(
    module: torch.nn.Module, path: Path, elements: tuple[str, ...] = ("H", "C", "N", "O"), n_members: int = 1, untrained: Sequence[str] = ()
) -> Path:
    """Write a module as a file that `load_model` opens."""
    scripted = torch.jit.script(module.eval()).to(torch.float64)
    x, z = torch.tensor([[0.0, 0, 0], [0.11, 0.01, 0.0]], dtype=torch.float64), torch.tensor([8, 1])
    energy, forces = scripted(x, z)
    scripted.to(torch.float32)
    metadata = ModelMetadata(
        format_version=FORMAT_VERSION,
        name=path.stem,
        elements=list(elements),
        cutoff_nm=CUTOFF_NM,
        n_layers=1,
        n_parameters=0,
        units={"positions": "nm", "energy": "kJ/mol", "forces": "kJ/mol/nm"},
        self_energies={},
        level_of_theory="none",
        weights_sha256=weights_sha256(scripted.state_dict()),
        training_data={},
        licence="MIT",
        citation="",
        code_version="",
        torch_version=torch.__version__,
        golden=[GoldenStructure("pair", z.tolist(), x.tolist(), None, float(energy), forces.tolist())],
        metrics={},
        n_members=n_members,
        untrained=list(untrained),
    )
    text = metadata_to_json(metadata)
    torch.jit.save(scripted, str(path), _extra_files={METADATA_FILE: text, CHECKSUM_FILE: text_sha256(text)})
    return path


def random_matrix(n: int, seed: int = 0) -> np.ndarray:
    """Numbers of order one, ``(n, n)``."""
    return np.random.default_rng(seed).normal(size=(n, n))
