"""Small data, networks and configurations for the tests of `training`."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule

from benchmarks.clusters import NUMBERS
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


def random_features(channels, n_atoms: int, seed: int = 0) -> list[torch.Tensor]:
    """Features with the given channels per degree."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n_atoms, 2 * degree + 1, c, generator=generator, dtype=torch.get_default_dtype()) for degree, c in enumerate(channels)]


def equivariance_error(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Equation 3.1: relative size of the difference, the worst degree."""
    with torch.no_grad():
        return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(got, expected, strict=True))
