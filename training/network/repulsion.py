"""Short-range screened nuclear repulsion, so that atoms never fuse where no training data can be."""

import torch
from ase import units
from ase.data import covalent_radii
from torch import Tensor, nn

from training.network.radial import envelope

_COULOMB = units.Hartree * units.Bohr  # e^2 / (4 pi epsilon_0), eV Angstrom


class ScreenedRepulsion(nn.Module):
    """Ziegler-Biersack-Littmark repulsion, faded out inside the covalent contact (Ziegler et al., 1985).

    The pair energy is Z_i Z_j / r phi(r / a) times the p = 6 envelope that ends at `RANGE` times the sum of the
    covalent radii: single bonds near equilibrium do not feel it, and a collision meets a wall. Triple bonds are shorter than that, N2 by so
    much that it has 1.3 eV there, which the network learns to make good.

    Parameters
    ----------
    atomic_numbers : sequence of int
        Elements, in the order of the species index.
    """

    RANGE = 0.9
    COEFFICIENTS = (0.18175, 0.50986, 0.28022, 0.02817)
    EXPONENTS = (3.19980, 0.94229, 0.40290, 0.20162)

    charge_product: Tensor
    inverse_screening: Tensor
    inverse_range: Tensor
    coefficients: Tensor
    exponents: Tensor

    def __init__(self, atomic_numbers: tuple[int, ...]) -> None:
        super().__init__()
        z = torch.tensor(atomic_numbers, dtype=torch.get_default_dtype())
        radii = torch.tensor([covalent_radii[n] for n in atomic_numbers], dtype=z.dtype)
        self.register_buffer("charge_product", _COULOMB * z[:, None] * z[None, :])
        screening = 0.8854 * units.Bohr / (z[:, None] ** 0.23 + z[None, :] ** 0.23)
        self.register_buffer("inverse_screening", 1.0 / screening)
        self.register_buffer("inverse_range", 1.0 / (self.RANGE * (radii[:, None] + radii[None, :])))
        self.register_buffer("coefficients", torch.tensor(self.COEFFICIENTS, dtype=z.dtype))
        self.register_buffer("exponents", torch.tensor(self.EXPONENTS, dtype=z.dtype))

    def forward(self, species: Tensor, neighbors: Tensor, distance: Tensor, direction: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Energies and forces of the repulsion.

        Parameters
        ----------
        species : Tensor
            ``(n_atoms,)`` species index.
        neighbors, distance, direction, mask : Tensor
            ``(n_atoms, max_neighbors)`` (``direction`` with a last axis of 3), as everywhere in the network.

        Returns
        -------
        tuple of Tensor
            Energy per atom ``(n_atoms,)`` eV, half of each pair, and force ``(n_atoms, 3)`` eV/Angstrom.
        """
        energy, slope = self.pair(species.unsqueeze(1), species[neighbors], distance)
        # dE/dx_i of the pair is -slope u (u points from i to j): the force on i is slope u, repulsive as slope < 0.
        return 0.5 * (energy * mask).sum(1), ((slope * mask).unsqueeze(-1) * direction).sum(1)

    def pair(self, species: Tensor, other: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Energy of pairs, eV, and its derivative by the distance, for two species and a distance of shapes that broadcast."""
        pair = species * self.charge_product.shape[0] + other
        inverse_range = self.inverse_range.view(-1)[pair]
        r = distance.clamp_min(1e-2)
        x = (distance * inverse_range).clamp(max=1.0)
        inside = envelope(x, 1.0)
        slope_inside = -168.0 * x.pow(5) * (1.0 - x).square() * inverse_range
        scaled = (r * self.inverse_screening.view(-1)[pair]).unsqueeze(-1) * self.exponents
        terms = self.coefficients * torch.exp(-scaled)
        screen = terms.sum(-1)
        slope_screen = -(terms * self.exponents).sum(-1) * self.inverse_screening.view(-1)[pair]
        coulomb = self.charge_product.view(-1)[pair] / r
        energy = coulomb * screen * inside
        return energy, coulomb * (slope_screen * inside + screen * slope_inside) - energy / r
