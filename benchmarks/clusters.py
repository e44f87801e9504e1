"""Random clusters of atoms, and what orthogonal transformations do to their features: for `benchmarks.equivariance` and the tests."""

import numpy as np
import torch
from e3nn import o3

from training.network import AnyNetwork

#: Elements of a network that takes the species of `random_cluster`.
NUMBERS = (1, 6, 7, 8)


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


def transform(features: list[torch.Tensor], q: torch.Tensor) -> list[torch.Tensor]:
    """Rotate (or reflect) features of degrees 0, 1, 2 ..."""
    return [torch.einsum("mn,anc->amc", representation(q, degree).to(f.dtype), f) for degree, f in enumerate(features)]


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


def evaluate(network: AnyNetwork, species: torch.Tensor, positions: torch.Tensor):
    """Atomic energies and direct forces of one molecule."""
    neighbors, mask = all_pairs(positions.detach(), network.cutoff)
    return network(species, positions[neighbors] - positions.unsqueeze(1), neighbors, mask)
