"""The layers of the production form on particles that have velocities and charges."""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from training.network import NetworkConfig
from training.network.geometry import DEGREE_TWO_BASIS, EdgeGeometry
from training.network.linear import EquivariantLinear
from training.network.norm import EquivariantRMSNorm
from training.network.readout import DirectForceReadout
from training.network.transformer import TransformerLayer


@dataclass(frozen=True)
class NBodyNetworkConfig:
    """Sizes of the network; see `training.network.NetworkConfig` for those of the same name.

    Attributes
    ----------
    n_basis : int
        Radial functions, Gaussians of the logarithm of the distance; two at least, whose distance is their width.
    shortest, longest : float
        Distances between which the Gaussians stand.

    Raises
    ------
    ValueError
        For sizes of which no network can be built.
    """

    channels: tuple[int, ...] = (32, 16, 8)
    hidden_channels: int = 16
    num_heads: int = 4
    num_layers: int = 4
    n_basis: int = 10
    shortest: float = 0.05
    longest: float = 8.0
    radial_hidden: int = 32
    n_products: int = 16
    hidden: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.shortest < self.longest < math.inf:
            raise ValueError(f"shortest must be positive and less than longest, got {self.shortest} and {self.longest}")
        if len(self.channels) != 3 or min(self.channels) < 1:
            raise ValueError(f"channels must be three positive numbers (degrees 0, 1, 2), got {self.channels}")
        for name in (f.name for f in fields(self)):
            size, least = getattr(self, name), 2 if name == "n_basis" else 1
            if isinstance(size, int) and size < least:
                raise ValueError(f"{name} must be at least {least}, got {size}")
        if self.hidden_channels % self.num_heads:
            raise ValueError(f"hidden_channels ({self.hidden_channels}) must be divisible by num_heads ({self.num_heads})")


class EdgeScalars(nn.Module):
    """Invariants of a pair: how far, how fast, like or unlike charges.

    Gaussians of log r, because a close pair turns about itself many times while a far one hardly moves; then those times the product of the
    charges; then that product, r, the relative velocity along the line of the pair and its square.

    Parameters
    ----------
    n_basis : int
        Gaussians.
    shortest, longest : float
        Where the first and the last Gaussian stand.
    """

    N_OTHERS = 4
    centres: Tensor

    def __init__(self, n_basis: int, shortest: float, longest: float) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(0.0, 1.0, n_basis) * torch.tensor(longest / shortest).log() + torch.tensor(shortest).log())
        self.sharpness = 0.5 / float(self.centres[1] - self.centres[0]) ** 2
        self.size = 2 * n_basis + self.N_OTHERS

    def forward(self, distance: Tensor, direction: Tensor, relative_velocity: Tensor, charge_product: Tensor) -> Tensor:
        """``(n, k)``, ``(n, k, 3)``, ``(n, k, 3)`` and ``(n, k)`` to ``(n, k, size)``."""
        gaussians = torch.exp(-self.sharpness * (distance.clamp_min(1e-3).log().unsqueeze(-1) - self.centres).square())
        q = charge_product.unsqueeze(-1)
        approach = (relative_velocity * direction).sum(-1, keepdim=True)
        # A pair that meets is fast for a moment; the logarithm keeps the network's inputs of the order of one.
        speed = torch.log1p(relative_velocity.square().sum(-1, keepdim=True))
        return torch.cat([gaussians, q * gaussians, q, torch.log1p(distance).unsqueeze(-1), torch.asinh(approach), speed], dim=-1)


class NBodyTransformer(nn.Module):
    """Positions after a given time from positions, velocities and charges.

    Particles are fully connected. Degree 0 of a particle starts with its speed, degree 1 with its velocity, degree 2 with the symmetric traceless
    square of that; the charges enter as products on the edges. What the network gives is a correction to straight motion,

        x_i(t) = x_i + t v_i + s (d_i - mean_j d_j),

    with d the type-1 output. Velocities are taken relative to their mean and corrections sum to zero, so that the centre of mass goes straight on,
    as Newton's third law wants: the same in every moving frame.

    Parameters
    ----------
    config : NBodyNetworkConfig
        Sizes.
    n_particles : int
        Particles of a trajectory.
    time_ahead : float
        t.
    """

    scale: Tensor
    senders: Tensor
    square_basis: Tensor

    def __init__(self, config: NBodyNetworkConfig, n_particles: int, time_ahead: float) -> None:
        super().__init__()
        c = config.channels
        self.time_ahead, self.n_particles = time_ahead, n_particles
        self.geometry = EdgeGeometry()
        self.edge_scalars = EdgeScalars(config.n_basis, config.shortest, config.longest)
        self.embedding = EquivariantLinear((1, 1, 1), c)
        sizes = NetworkConfig(
            channels=c,
            hidden_channels=config.hidden_channels,
            num_heads=config.num_heads,
            num_layers=config.num_layers,
            n_basis=self.edge_scalars.size,
            radial_hidden=config.radial_hidden,
            n_products=config.n_products,
            hidden=config.hidden,
        )
        last = config.num_layers - 1
        self.layers = nn.ModuleList(TransformerLayer(sizes, c, c[:2] if i == last else c) for i in range(config.num_layers))
        self.norm = EquivariantRMSNorm(c[:2])
        self.readout = DirectForceReadout(c[0], c[1], config.hidden)
        self.register_buffer("scale", torch.ones(()))
        others = [[j for j in range(n_particles) if j != i] for i in range(n_particles)]
        self.register_buffer("senders", torch.tensor(others))
        basis = torch.tensor(DEGREE_TWO_BASIS, dtype=torch.get_default_dtype())
        self.register_buffer("square_basis", basis / basis.flatten(1).norm(dim=1).view(5, 1, 1))

    def forward(self, positions: Tensor, velocities: Tensor, charges: Tensor) -> Tensor:
        """``(n_trajectories, n_particles, 3)`` twice and ``(n_trajectories, n_particles)`` to positions, shaped as the first."""
        n_trajectories, n, _ = positions.shape
        first = torch.arange(n_trajectories, device=positions.device).view(-1, 1, 1) * n
        neighbors = (first + self.senders).view(-1, n - 1)
        mask = torch.ones_like(neighbors, dtype=torch.bool)
        x, q = positions.reshape(-1, 3), charges.reshape(-1)
        v = (velocities - velocities.mean(1, keepdim=True)).reshape(-1, 3)

        distance, direction, coupling = self.geometry(x[neighbors] - x.unsqueeze(1), mask)
        scalars = self.edge_scalars(distance, direction, v[neighbors] - v.unsqueeze(1), q[neighbors] * q.unsqueeze(1))
        square = torch.einsum("mab,na,nb->nm", self.square_basis, v, v)
        speed = v.square().sum(-1, keepdim=True)
        features = self.embedding([speed.unsqueeze(-1), v.unsqueeze(-1), square.unsqueeze(-1)])
        everybody = torch.ones_like(distance)  # no cutoff
        for layer in self.layers:
            features = layer(features, neighbors, scalars, direction, coupling, everybody)
        features = self.norm(features)
        correction = self.readout(features[0], features[1]).view(n_trajectories, n, 3)
        correction = correction - correction.mean(1, keepdim=True)
        return positions + self.time_ahead * velocities + self.scale * correction
