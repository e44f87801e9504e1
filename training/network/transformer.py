"""The network of Fig. 2.1: degree 0 in, degrees 0 to 2 inside, an energy and a force per atom out."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from training.network.attention import EquivariantAttention
from training.network.geometry import EdgeGeometry
from training.network.norm import EquivariantRMSNorm
from training.network.radial import BesselBasis, envelope
from training.network.readout import DirectForceReadout, EnergyReadout
from training.network.repulsion import ScreenedRepulsion
from training.network.self_interaction import AttentiveSelfInteraction


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the network.

    Attributes
    ----------
    form : str
        ``production``, which tells it from the reference form.
    elements : tuple of str
        Chemical symbols the network knows, in the order of the species index.
    cutoff : float
        Neighbour cutoff, Angstrom.
    channels : tuple of int
        Channels of degree 0, 1 and 2 of the node features.
    hidden_channels : int
        Channels of every degree inside the attention (the rank of the kernels).
    num_heads : int
        Attention heads.
    num_layers : int
        Attention layers. The last of several has no degree 2; a single one has, since there directions meet in its self-interaction alone.
    n_basis, radial_hidden : int
        Radial basis functions, and width of the radial networks.
    n_products, hidden : int
        Invariant products per degree and width of the networks on the nodes.
    """

    form: Literal["production"] = "production"
    elements: tuple[str, ...] = ("H", "C", "N", "O")
    cutoff: float = 5.0
    channels: tuple[int, ...] = (128, 64, 32)
    hidden_channels: int = 32
    num_heads: int = 8
    num_layers: int = 3
    n_basis: int = 12
    radial_hidden: int = 32
    n_products: int = 32
    hidden: int = 128


class TransformerLayer(nn.Module):
    """Norm, attention over neighbours, norm, attentive self-interaction; each adds to the residual stream (equation 2.8)."""

    def __init__(self, config: NetworkConfig, channels_in: tuple[int, ...], channels_out: tuple[int, ...]) -> None:
        super().__init__()
        self.norm = EquivariantRMSNorm(channels_in)
        self.attention = EquivariantAttention(
            channels_in=channels_in,
            channels_out=channels_out,
            hidden_channels=config.hidden_channels,
            num_heads=config.num_heads,
            n_basis=config.n_basis,
            radial_hidden=config.radial_hidden,
        )
        self.norm_after = EquivariantRMSNorm(channels_out)
        self.self_interaction = AttentiveSelfInteraction(channels_out, config.n_products, config.hidden)
        self.n_out = len(channels_out)

    def forward(
        self, features: list[Tensor], neighbors: Tensor, basis: Tensor, direction: Tensor, coupling: Tensor, cutoff_weight: Tensor
    ) -> list[Tensor]:
        """Arguments and result as in `EquivariantAttention.forward`."""
        update = self.attention(self.norm(features), neighbors, basis, direction, coupling, cutoff_weight)
        state: list[Tensor] = []
        for degree in range(self.n_out):
            state.append(features[degree] + update[degree] if degree < len(features) else update[degree])
        update = self.self_interaction(self.norm_after(state))
        out: list[Tensor] = []
        for degree in range(self.n_out):
            out.append(state[degree] + update[degree])
        return out


class SE3Transformer(nn.Module):
    """Energy and direct force of every atom from species and displacements.

    Parameters
    ----------
    config : NetworkConfig
        Sizes.
    atomic_numbers : sequence of int
        Atomic number of each species, in the order of ``config.elements``.

    Notes
    -----
    The outputs are physical: the readouts are scaled by ``energy_scale`` and ``force_scale`` and shifted by
    ``energy_shift`` per species, buffers that training sets from the statistics of its data.
    """

    energy_scale: Tensor
    force_scale: Tensor
    energy_shift: Tensor

    def __init__(self, config: NetworkConfig, atomic_numbers: tuple[int, ...]) -> None:
        super().__init__()
        self.cutoff = config.cutoff
        c = config.channels
        self.embedding = nn.Embedding(len(config.elements), c[0])
        self.geometry = EdgeGeometry()
        self.basis = BesselBasis(config.n_basis, config.cutoff)
        self.repulsion = ScreenedRepulsion(atomic_numbers)
        layers = []
        for i in range(config.num_layers):
            channels_in = c[:1] if i == 0 else c
            channels_out = c[:2] if 0 < i == config.num_layers - 1 else c
            layers.append(TransformerLayer(config, channels_in, channels_out))
        self.layers = nn.ModuleList(layers)
        self.final_norm = EquivariantRMSNorm(c[:2])
        self.energy_readout = EnergyReadout(c[0], config.hidden)
        self.force_readout = DirectForceReadout(c[0], c[1], config.hidden)
        dtype = torch.get_default_dtype()
        self.register_buffer("energy_scale", torch.ones((), dtype=dtype))
        self.register_buffer("force_scale", torch.ones((), dtype=dtype))
        self.register_buffer("energy_shift", torch.zeros(len(config.elements), dtype=dtype))

    def forward(self, species: Tensor, displacement: Tensor, neighbors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the network.

        Parameters
        ----------
        species : Tensor
            ``(n_atoms,)`` int64, index into ``config.elements``.
        displacement : Tensor
            ``(n_atoms, max_neighbors, 3)`` x_j - x_i, Angstrom. Its dtype may be wider than that of the weights: distances and
            radial basis are computed in it, because forces magnify the rounding of a distance by stiffness * length / force,
            some thirty times in a molecule.
        neighbors : Tensor
            ``(n_atoms, max_neighbors)`` int64 index j, 0 on padding.
        mask : Tensor
            ``(n_atoms, max_neighbors)`` bool, False on padding.

        Returns
        -------
        tuple of Tensor
            Energy per atom ``(n_atoms,)`` eV (their sum is the energy relative to self-energies) and direct force
            ``(n_atoms, 3)`` eV/Angstrom.
        """
        dtype = self.energy_scale.dtype
        distance, wide_direction, wide_coupling = self.geometry(displacement, mask)
        cutoff_weight = (envelope(distance, self.cutoff) * mask).to(dtype)
        basis = self.basis(distance).to(dtype)
        direction, coupling = wide_direction.to(dtype), wide_coupling.to(dtype)
        features = [self.embedding(species).unsqueeze(1)]
        for layer in self.layers:
            features = layer(features, neighbors, basis, direction, coupling, cutoff_weight)
        features = self.final_norm(features[:2])
        repulsion_energy, repulsion_force = self.repulsion(species, neighbors, distance.to(dtype), direction, mask)
        energy = self.energy_readout(features[0]) * self.energy_scale + self.energy_shift[species] + repulsion_energy
        force = self.force_readout(features[0], features[1]) * self.force_scale + repulsion_force
        return energy, force
