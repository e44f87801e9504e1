"""Small data, networks and configurations for the tests of `training`."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from e3nn import o3

from training.config import FitConfig, parse_config
from training.data.packed import PackedDataset
from training.data.prepare import prepare
from training.network import NetworkConfig, SE3Transformer

SAMPLE = Path(__file__).parent.parent / "data" / "ani1x_sample.h5"
KEYS = {"energy_key": "ani1x_ensemble.energy", "force_key": "ani1x_ensemble.forces"}
# Unequal channels per degree, on purpose: equal ones hide mistakes of bookkeeping.
SMALL = NetworkConfig(
    elements=("H", "C", "N", "O"),
    cutoff=4.0,
    channels=(10, 6, 4),
    hidden_channels=8,
    num_heads=4,
    num_layers=3,
    n_basis=6,
    radial_hidden=8,
    n_products=5,
    hidden=12,
)
NUMBERS = (1, 6, 7, 8)
#: eV by which `free_atoms` differs from a least-squares fit.
BINDING = {"H": 2.5, "C": 7.0, "N": 5.0, "O": 4.0}


def small_network(seed: int = 0, num_layers: int = 3) -> SE3Transformer:
    """A small network with random weights, in torch's default precision."""
    torch.manual_seed(seed)
    return SE3Transformer(replace(SMALL, num_layers=num_layers), NUMBERS).eval()


def sample_dataset(directory: Path, **changes) -> PackedDataset:
    """The shipped sample, packed."""
    options = {**KEYS, "validation": 0.2, **changes}
    return prepare([SAMPLE], directory / "packed", **options)


def distorted_waters(n: int, forces: bool = True) -> list[Atoms]:
    """Frames of extended XYZ, with energies and forces that mean nothing."""
    rng, frames = np.random.default_rng(1), []
    for i in range(n):
        atoms = molecule("H2O")
        atoms.positions += rng.normal(scale=0.05, size=(3, 3))
        atoms.info["energy"] = -2000.0 + 0.01 * i
        if forces:
            atoms.arrays["forces"] = rng.normal(size=(3, 3))
        frames.append(atoms)
    return frames


def free_atoms(directory: Path) -> Path:
    """A table of self-energies against which the molecules of the sample are bound by some eV per atom, as against isolated atoms."""
    fitted = sample_dataset(directory / "fitted").metadata["self_energies"]
    path = directory / "free-atoms.json"
    path.write_text(json.dumps({"unit": "eV"} | {s: e + BINDING[s] for s, e in fitted.items()}))
    return path


def small_config(data: Path, **run) -> FitConfig:
    """A configuration that trains in seconds."""
    network = {k: getattr(SMALL, k) for k in SMALL.__dataclass_fields__}
    defaults = {"max_steps": 6, "batch_molecules": 8, "validate_every": 4, "checkpoint_every": 2, "log_every": 1}
    raw = {
        "data": str(data),
        "network": network,
        "optimizer": {"learning_rate": 5e-3, "warmup_steps": 2, "ema_decay": 0.9},
        "run": {**defaults, **run},
    }
    return parse_config(raw, "test")


def random_orthogonal(seed: int, reflect: bool) -> torch.Tensor:
    """Random rotation, or rotation with a reflection, float64 ``(3, 3)``."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    if (np.linalg.det(q) < 0) != reflect:
        q[:, 0] *= -1
    return torch.tensor(q)


def representation(q: torch.Tensor, degree: int) -> torch.Tensor:
    """Matrix of an orthogonal transformation on features of one degree with natural parity, from e3nn, float64."""
    rotation = q * torch.det(q)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        matrix = o3.Irrep(degree, 1).D_from_matrix(rotation)
    finally:
        torch.set_default_dtype(previous)
    return matrix * torch.det(q) ** degree


def random_features(channels, n_atoms: int, seed: int = 0) -> list[torch.Tensor]:
    """Features with the given channels per degree."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n_atoms, 2 * degree + 1, c, generator=generator, dtype=torch.get_default_dtype()) for degree, c in enumerate(channels)]


def transform(features: list[torch.Tensor], q: torch.Tensor) -> list[torch.Tensor]:
    """Rotate (or reflect) features of degrees 0, 1, 2 ..."""
    return [torch.einsum("mn,anc->amc", representation(q, degree).to(f.dtype), f) for degree, f in enumerate(features)]


def equivariance_error(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Equation 3.1: relative size of the difference, the worst degree."""
    with torch.no_grad():
        return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(got, expected, strict=True))


def random_cluster(n_atoms: int, seed: int = 0, spread: float = 1.4) -> tuple[torch.Tensor, torch.Tensor]:
    """Species and positions (Angstrom, float64) of atoms that keep a distance of 0.9 Angstrom."""
    rng = np.random.default_rng(seed)
    positions: list[np.ndarray] = []
    while len(positions) < n_atoms:
        candidate = rng.normal(scale=spread, size=3)
        if all(np.linalg.norm(candidate - p) > 0.9 for p in positions):
            positions.append(candidate)
    return torch.tensor(rng.integers(0, 4, size=n_atoms)), torch.tensor(np.array(positions))


def all_pairs(positions: torch.Tensor, cutoff: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbour matrix of one molecule: every other atom in a slot, masked by the cutoff."""
    n = len(positions)
    others = torch.tensor([[j for j in range(n) if j != i] for i in range(n)])
    mask = (positions[others] - positions.unsqueeze(1)).norm(dim=-1) < cutoff
    return torch.where(mask, others, 0), mask


def evaluate(network: SE3Transformer, species: torch.Tensor, positions: torch.Tensor):
    """Atomic energies and direct forces of one molecule."""
    neighbors, mask = all_pairs(positions.detach(), network.cutoff)
    return network(species, positions[neighbors] - positions.unsqueeze(1), neighbors, mask)
