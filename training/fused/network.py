"""The whole network in its inference form; `FusedTransformer.forward` has the signature of `SE3Transformer.forward`."""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from training.fused.attention import FusedAttention, FusedFirstAttention
from training.fused.nodes import AddedLinear, FusedReadout, FusedSelfInteraction, JointScale, MergedLinear
from training.fused.repulsion import TabulatedRepulsion
from training.fused.spline import SplineBasis
from training.network import SE3Transformer
from training.network.geometry import DEGREE_TWO_BASIS
from training.network.radial import BesselBasis, envelope
from training.network.transformer import TransformerLayer

N_INTERVALS = 512
#: Edges treated at once on a processor, so that what is made of them stays in its cache; on a GPU only memory bounds it.
EDGES_AT_ONCE_CPU = 2048
EDGES_AT_ONCE_GPU = 2_000_000
#: Logarithm of the envelope on padding and at the cutoff: its exponential is exactly zero beside any finite logit.
NO_WEIGHT = -1e4


class FusedLayer(nn.Module):
    """One layer: norm, attention, residual sum, norm, self-interaction, residual sum.

    Parameters
    ----------
    layer : TransformerLayer
        The trained layer.
    basis : BesselBasis
        Radial basis of the network.
    """

    def __init__(self, layer: TransformerLayer, basis: BesselBasis) -> None:
        super().__init__()
        attention = layer.attention
        self.channels = attention.hidden_channels
        self.edges_at_once_cpu, self.edges_at_once_gpu = EDGES_AT_ONCE_CPU, EDGES_AT_ONCE_GPU
        self.scale = JointScale(layer.norm)
        self.value_query = MergedLinear([attention.value, attention.query], layer.norm)
        is_first = attention.messages.degree_in == 0
        self.attention = (FusedFirstAttention if is_first else FusedAttention)(attention, basis, N_INTERVALS)
        self.add = AddedLinear(attention.out, len(layer.norm.gains))
        self.self_interaction = FusedSelfInteraction(layer.self_interaction, layer.norm_after)

    def forward(
        self, state: list[Tensor], neighbors: Tensor, rows: Tensor, weights: Tensor, harmonics: Tensor, coupling: Tensor, log_cutoff: Tensor
    ) -> list[Tensor]:
        """State before to state after; edge tensors as in `FusedAttention.forward`, for all receivers."""
        n_atoms, width = neighbors.shape[0], neighbors.shape[1]
        scale = self.scale(state)
        values: list[Tensor] = []
        queries: list[Tensor] = []
        # narrow and not a slice: x[:, :, a:b] costs three operations, one for each colon.
        for y in self.value_query(state):
            values.append(y.narrow(2, 0, self.channels))
            if y.shape[2] > self.channels:
                queries.append(y.narrow(2, self.channels, self.channels))
        value, query = torch.cat(values, dim=1) * scale, torch.cat(queries, dim=1) * scale
        portion = max(1, (self.edges_at_once_gpu if neighbors.is_cuda else self.edges_at_once_cpu) // width)
        if n_atoms <= portion:
            gathered = self.attention(query, value, neighbors, rows, weights, harmonics, coupling, log_cutoff)
        else:
            # split and not slices: the gradient of a slice fills a tensor of the full size with zeros, that of split does not.
            edges = portion * width
            portions: list[Tensor] = []
            for q, j, r, w, h, g, c in zip(  # noqa: B905 - TorchScript knows no strict=
                query.split(portion),
                neighbors.split(portion),
                rows.split(edges),
                weights.split(edges),
                harmonics.split(edges),
                coupling.split(edges),
                log_cutoff.split(portion),
            ):
                portions.append(self.attention(q, value, j, r, w, h, g, c))
            gathered = torch.cat(portions)
        return self.self_interaction(self.add(state, gathered))


class FusedTransformer(nn.Module):
    """Energy and direct force of every atom, with the weights of a trained network.

    Parameters
    ----------
    network : SE3Transformer
        Trained network; it is left as it was.
    """

    energy_shift: Tensor
    embedding: Tensor
    coupling_basis: Tensor
    squared_norms: Tensor
    harmless: Tensor

    def __init__(self, network: SE3Transformer) -> None:
        super().__init__()
        dtype = network.energy_scale.dtype
        # Tables and merged weights are computed in float64 and rounded once.
        source = copy.deepcopy(network).to(torch.float64)
        self.cutoff = network.cutoff
        self.no_weight = NO_WEIGHT
        self.spline = SplineBasis(network.cutoff, N_INTERVALS)
        self.layers = nn.ModuleList(FusedLayer(cast(TransformerLayer, layer), source.basis) for layer in source.layers)
        self.readout = FusedReadout(source.energy_readout, source.force_readout, source.final_norm, source.energy_scale, source.force_scale)
        self.repulsion = TabulatedRepulsion(source.repulsion)
        self.register_buffer("embedding", source.embedding.weight.detach().clone().unsqueeze(1))
        self.register_buffer("energy_shift", source.energy_shift.clone())
        basis = torch.tensor(DEGREE_TWO_BASIS, dtype=torch.float64)
        self.register_buffer("coupling_basis", basis.permute(2, 0, 1).reshape(3, 15).contiguous())
        self.register_buffer("squared_norms", basis.square().sum([1, 2]).repeat_interleave(3))
        self.register_buffer("harmless", torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
        self.to(dtype)
        self.requires_grad_(False)

    def forward(self, species: Tensor, displacement: Tensor, neighbors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Arguments and results as in `SE3Transformer.forward`."""
        dtype = self.energy_shift.dtype
        # Padding gets a harmless displacement before any non-linear operation; the bound keeps coincident atoms finite.
        d = torch.where(mask.unsqueeze(-1), displacement, self.harmless.to(displacement.dtype))
        distance = torch.sqrt((d * d).sum(-1).clamp_min(1e-12))
        u = (d / distance.unsqueeze(-1)).to(dtype)
        log_cutoff = torch.where(mask, torch.log(envelope(distance, self.cutoff).clamp_min(1e-14)), self.no_weight).to(dtype).unsqueeze(-1)
        rows, weights = self.spline(distance.view(-1))
        flat = u.view(-1, 3)
        coupling = (torch.matmul(flat, self.coupling_basis) * torch.rsqrt(self.squared_norms)).view(-1, 5, 3)
        harmonics = torch.cat([torch.ones_like(flat[:, :1]), flat, torch.bmm(coupling, flat.unsqueeze(2)).squeeze(2)], dim=1)
        state = [self.embedding.index_select(0, species)]
        for layer in self.layers:
            state = layer(state, neighbors, rows, weights, harmonics, coupling, log_cutoff)
        energy, force = self.readout(state)
        repulsion_energy, repulsion_force = self.repulsion(species, neighbors, distance, u, mask)
        return energy + self.energy_shift.index_select(0, species) + repulsion_energy, force + repulsion_force


def inference_form(network: nn.Module) -> nn.Module:
    """What an exported file holds of a network: the fused form of an `SE3Transformer`, any other network as it is."""
    return FusedTransformer(network) if isinstance(network, SE3Transformer) else network
