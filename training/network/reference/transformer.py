"""Fig. 2.1 of the thesis: degree 0 in, degrees 0 to 2 or 3 inside, an energy and a force per atom out."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from training.network.geometry import distances_and_directions
from training.network.linear import EquivariantLinear
from training.network.radial import BesselBasis, envelope
from training.network.reference.basis_kernels import BasisKernels
from training.network.reference.embedding import LearnedEmbedding, OneHotEmbedding, PhysicalEmbedding
from training.network.reference.layer import ReferenceLayer
from training.network.reference.norm import NormNonlinearity


@dataclass(frozen=True)
class ReferenceConfig:
    """Sizes of the reference form.

    Attributes
    ----------
    form : str
        ``reference``, which tells it from the production form.
    elements : tuple of str
        Chemical symbols the network knows, in the order of the species index; more than the data hold, if you like.
    cutoff : float
        Neighbour cutoff, Angstrom.
    channels : tuple of int
        Channels of degree 0, 1, 2 and, if there is a fourth number, 3: of the node features between the layers.
    head_channels : tuple of int or None
        The same of each attention head; None for those of the node features.
    num_heads, num_layers : int
        Attention heads, and layers (at least 2).
    embedding : str
        ``one-hot`` (the thesis), ``learned``, or ``physical``: period, group, electronegativity and radius.
    embedding_channels : int
        Length of a learned or physical embedding.
    parity : str
        ``all`` J from abs(k - l) to k + l (the thesis; energies of mirror images may differ), or ``natural``: only l + k + J even.
    n_basis, radial_hidden : int
        Radial basis functions, and width of the radial networks.
    hidden : int
        Width of the networks of the self-interaction.

    Raises
    ------
    ValueError
        If a size cannot be built.
    """

    form: Literal["reference"] = "reference"
    elements: tuple[str, ...] = ("H", "C", "N", "O")
    cutoff: float = 5.0
    channels: tuple[int, ...] = (2, 2, 2)
    head_channels: tuple[int, ...] | None = None
    num_heads: int = 8
    num_layers: int = 3
    embedding: Literal["one-hot", "learned", "physical"] = "one-hot"
    embedding_channels: int = 16
    parity: Literal["all", "natural"] = "all"
    n_basis: int = 12
    radial_hidden: int = 32
    hidden: int = 32

    def __post_init__(self) -> None:
        if not 2 <= len(self.channels) <= 4 or min(self.channels) < 1:
            raise ValueError(f"channels must be two to four positive numbers (degrees 0 to 3), got {self.channels}")
        if self.head_channels is not None and (len(self.head_channels) != len(self.channels) or min(self.head_channels) < 1):
            raise ValueError(f"head_channels must be as many positive numbers as channels ({len(self.channels)}), got {self.head_channels}")
        if self.num_layers < 2:
            raise ValueError(f"num_layers must be at least 2, got {self.num_layers}")
        if self.cutoff <= 0:
            raise ValueError(f"cutoff must be positive (Angstrom), got {self.cutoff}")


class ReferenceTransformer(nn.Module):
    """Energy and force of every atom from species and displacements: the network of Fig. 2.1.

    Inputs, outputs and the scales of the outputs are those of `training.network.SE3Transformer`.

    Parameters
    ----------
    config : ReferenceConfig
        Sizes.
    atomic_numbers : tuple of int
        Atomic number of each species, in the order of ``config.elements``.

    Raises
    ------
    ValueError
        If the embedding is physical and has no properties for an element.
    """

    energy_scale: Tensor
    force_scale: Tensor
    energy_shift: Tensor

    def __init__(self, config: ReferenceConfig, atomic_numbers: tuple[int, ...]) -> None:
        super().__init__()
        self.cutoff = config.cutoff
        natural, c = config.parity == "natural", config.channels
        self.embedding: OneHotEmbedding | LearnedEmbedding | PhysicalEmbedding
        if config.embedding == "one-hot":
            self.embedding = OneHotEmbedding(len(atomic_numbers))
        elif config.embedding == "learned":
            self.embedding = LearnedEmbedding(len(atomic_numbers), config.embedding_channels)
        else:
            self.embedding = PhysicalEmbedding(atomic_numbers, config.embedding_channels)
        self.basis = BesselBasis(config.n_basis, config.cutoff)
        self.basis_kernels = BasisKernels(len(c) - 1, natural)
        layers = []
        for i in range(config.num_layers):
            layers.append(
                ReferenceLayer(
                    channels_in=(self.embedding.channels,) if i == 0 else c,
                    channels_out=c[:2] if i == config.num_layers - 1 else c,
                    head_channels=config.head_channels or c,
                    num_heads=config.num_heads,
                    max_degree=len(c) - 1,
                    natural_parity=natural,
                    n_scalars=config.n_basis,
                    radial_hidden=config.radial_hidden,
                    hidden=config.hidden,
                )
            )
        self.first_layer = layers[0]
        self.norms = nn.ModuleList(NormNonlinearity(c) for _ in layers[1:])
        self.layers = nn.ModuleList(layers[1:])
        self.readout = EquivariantLinear(c[:2], (1, 1))
        dtype = torch.get_default_dtype()
        self.register_buffer("energy_scale", torch.ones((), dtype=dtype))
        self.register_buffer("force_scale", torch.ones((), dtype=dtype))
        self.register_buffer("energy_shift", torch.zeros(len(atomic_numbers), dtype=dtype))

    def forward(self, species: Tensor, displacement: Tensor, neighbors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the network.

        Parameters
        ----------
        species : Tensor
            ``(n_atoms,)`` int64, index into ``config.elements``.
        displacement : Tensor
            ``(n_atoms, max_neighbors, 3)`` x_j - x_i, Angstrom, in the dtype of the weights or a wider one.
        neighbors, mask : Tensor
            ``(n_atoms, max_neighbors)`` int64 index j (0 on padding), and bool.

        Returns
        -------
        tuple of Tensor
            Energy per atom ``(n_atoms,)`` eV (their sum is the energy relative to self-energies) and force ``(n_atoms, 3)`` eV/Angstrom.
        """
        like = self.energy_scale
        distance, direction = distances_and_directions(displacement, mask)
        cutoff_weight = (envelope(distance, self.cutoff) * mask).to(like.dtype)
        scalars = self.basis(distance).to(like.dtype)
        kernels: list[Tensor] = []
        for kernel in self.basis_kernels(direction):
            kernels.append(kernel.to(like.dtype))
        features = self.first_layer([self.embedding(species, like).unsqueeze(1)], neighbors, scalars, kernels, cutoff_weight)
        for norm, layer in zip(self.norms, self.layers):  # noqa: B905 - TorchScript knows no strict=
            features = layer(norm(features), neighbors, scalars, kernels, cutoff_weight)
        out = self.readout(features)
        energy = out[0].view(-1) * self.energy_scale + self.energy_shift[species]
        return energy, out[1].squeeze(-1) * self.force_scale
