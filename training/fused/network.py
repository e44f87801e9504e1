"""The whole network in its inference form; `FusedTransformer.forward` has the signature of `SE3Transformer.forward`."""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from training.fused.attention import FusedAttention, FusedFirstAttention
from training.fused.edges import FusedGeometry
from training.fused.nodes import AddedLinear, FusedReadout, FusedSelfInteraction, JointScale, MergedLinear
from training.fused.repulsion import TabulatedRepulsion
from training.fused.spline import SplineBasis, values_alone
from training.network import SE3Transformer
from training.network.radial import BesselBasis
from training.network.transformer import TransformerLayer

N_INTERVALS = 512
#: Edges treated at once on a processor, so that what is made of them stays in its cache; on a GPU only memory bounds it.
EDGES_AT_ONCE_CPU = 512
EDGES_AT_ONCE_GPU = 2_000_000
#: With more edges than these, the gradient computes the messages again, portion by portion, in place of keeping some 10 kB for each edge.
EDGES_KEPT_CPU = 1024
EDGES_KEPT_GPU = 200_000
#: Portions on a processor that the last layer goes there and back with at once: what atoms do on their own costs less for many, but the edges
#: wait for it in memory. A portion of a GPU is large enough.
PORTIONS_TURNED_CPU = 4


def _edges(of_edges: Tensor, start: int, n: int, max_neighbors: int) -> Tensor:
    """Rows of the edges of `n` receivers from `start` on."""
    return of_edges.narrow(0, start * max_neighbors, n * max_neighbors)


def _joined(portions: list[Tensor]) -> Tensor:
    """All atoms again; a molecule is a single portion, and nothing is copied."""
    return portions[0] if len(portions) == 1 else torch.cat(portions)


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
        self.edges_kept_cpu, self.edges_kept_gpu = EDGES_KEPT_CPU, EDGES_KEPT_GPU
        self.scale = JointScale(layer.norm)
        self.value_query = MergedLinear([attention.value, attention.query], layer.norm)
        self.is_first = attention.messages.degree_in == 0
        # Degrees 0 .. of the features, 2 l + 1 components each, and how many components a query has.
        self.components = [2 * degree + 1 for degree in range(attention.messages.degree_in + 1)]
        self.asked = sum(2 * degree + 1 for degree in range(len(attention.query.maps)))
        self.attention = (FusedFirstAttention if self.is_first else FusedAttention)(attention, basis, N_INTERVALS)
        self.add = AddedLinear(attention.out, len(layer.norm.gains))
        self.self_interaction = FusedSelfInteraction(layer.self_interaction, layer.norm_after)

    def portion(self, neighbors: Tensor) -> int:
        """Receivers treated at once."""
        return max(1, (self.edges_at_once_gpu if neighbors.is_cuda else self.edges_at_once_cpu) // neighbors.shape[1])

    def keeps(self, neighbors: Tensor) -> bool:
        """Whether the gradient uses what `forward` made of the edges."""
        return neighbors.numel() <= (self.edges_kept_gpu if neighbors.is_cuda else self.edges_kept_cpu)

    def before(self, state: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scale of the norm, values and queries side by side, values, queries."""
        scale = self.scale(state)
        both = torch.cat(self.value_query(state), dim=1) * scale
        return scale, both, both.narrow(2, 0, self.channels).contiguous(), both.narrow(2, self.channels, self.channels).narrow(1, 0, self.asked)

    def before_adjoint(self, state: list[Tensor], scale: Tensor, both: Tensor, g_value: Tensor, g_query: Tensor, g: list[Tensor]) -> list[Tensor]:
        """Cotangent of the state before from those of values, queries and, `g`, of the residual stream."""
        if g_query.shape[1] < g_value.shape[1]:
            g_query = torch.constant_pad_nd(g_query, [0, 0, 0, g_value.shape[1] - g_query.shape[1]])
        g_both = torch.cat([g_value, g_query], dim=2)
        # Degrees that end in this layer are needed for values alone.
        for degree in range(len(g), len(state)):
            g.append(torch.zeros_like(state[degree]))
        g = self.value_query.adjoint((g_both * scale).split(self.components, dim=1), g)
        return self.scale.adjoint(state, scale, (g_both * both).sum([1, 2]).unsqueeze(1), g)

    def forward(
        self, state: list[Tensor], neighbors: Tensor, spline: tuple[Tensor, Tensor, Tensor], coupling: Tensor, log_cutoff: Tensor, keep: bool = False
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """State before to state after.

        Parameters
        ----------
        state : list of Tensor
            One per degree.
        neighbors, spline, coupling, log_cutoff
            As in `FusedAttention.forward`, of all receivers.
        keep : bool
            Whether `adjoint` is to follow.

        Returns
        -------
        tuple of list of Tensor
            The state, and what `adjoint` needs of atoms and of edges.
        """
        scale, both, value, query = self.before(state)
        portion = self.portion(neighbors)
        of_edges: list[Tensor] = []
        if keep and self.keeps(neighbors):
            gathered, alpha, of_edges = self.attention(query, value, neighbors, spline, coupling, log_cutoff)
        elif neighbors.shape[0] <= portion:
            gathered, alpha, _ = self.attention(query, value, neighbors, values_alone(spline), coupling, log_cutoff)
        else:
            # split and not slices: the gradient of a slice fills a tensor of the full size with zeros, that of split does not.
            edges = portion * neighbors.shape[1]
            rows, weights, starts = values_alone(spline)
            portions: list[Tensor] = []
            alphas: list[Tensor] = []
            for q, j, r, w, a, c in zip(  # noqa: B905 - TorchScript knows no strict=
                query.split(portion),
                neighbors.split(portion),
                rows.split(edges),
                weights.split(edges),
                coupling.split(edges),
                log_cutoff.split(portion),
            ):
                one, alpha, _ = self.attention(q, value, j, (r, w, starts.narrow(0, 0, r.shape[0])), a, c)
                portions.append(one)
                if keep:
                    alphas.append(alpha)
            gathered = torch.cat(portions)
            alpha = torch.cat(alphas) if keep else gathered
        middle = self.add(state, gathered)
        out, of_interaction = self.self_interaction(middle)
        return out, [scale, both, value, gathered, alpha] + middle + of_interaction, of_edges  # noqa: RUF005 - TorchScript knows no unpacking

    def adjoint(
        self,
        state: list[Tensor],
        of_atoms: list[Tensor],
        of_edges: list[Tensor],
        neighbors: Tensor,
        spline: tuple[Tensor, Tensor, Tensor],
        coupling: Tensor,
        g: list[Tensor],
        g_slots: Tensor,
        g_coupling: Tensor,
        g_log_cutoff: Tensor,
    ) -> list[Tensor]:
        """Cotangent of the state after to that of the state before.

        Parameters
        ----------
        state : list of Tensor
            As given to `forward`.
        of_atoms, of_edges : list of Tensor
            From `forward`.
        neighbors, spline, coupling
            As given to `forward`, the spline with slopes.
        g : list of Tensor
            Cotangent of the state after.
        g_slots, g_coupling, g_log_cutoff : Tensor
            As in `FusedAttention.adjoint`, of all receivers.

        Returns
        -------
        list of Tensor
            One per degree; empty for the first layer, whose state does not depend on the positions.
        """
        scale, both, value, gathered, alpha = of_atoms[0], of_atoms[1], of_atoms[2], of_atoms[3], of_atoms[4]
        query = both.narrow(2, self.channels, self.channels).narrow(1, 0, self.asked)
        n_degrees = len(g)
        g = self.self_interaction.adjoint(of_atoms[5 : 5 + n_degrees], of_atoms[5 + n_degrees :], g)
        g_gathered = self.add.adjoint(g)
        g_value = torch.zeros_like(value)
        if len(of_edges) > 0:
            g_query = self.attention.adjoint(
                of_edges, alpha, gathered, query, neighbors, coupling, g_gathered, g_value, g_slots, g_coupling, g_log_cutoff
            )
        else:
            portion = self.portion(neighbors)
            edges = portion * neighbors.shape[1]
            portions: list[Tensor] = []
            for q, j, r, w, a, x, y, p, s, b, o in zip(  # noqa: B905 - TorchScript knows no strict=
                query.split(portion),
                neighbors.split(portion),
                spline[0].split(edges),
                spline[1].split(edges),
                coupling.split(edges),
                alpha.split(portion),
                gathered.split(portion),
                g_gathered.split(portion),
                g_slots.split(edges),
                g_coupling.split(edges),
                g_log_cutoff.split(portion),
            ):
                starts = spline[2].narrow(0, 0, r.shape[0] * r.shape[1])
                again = self.attention.make(q, value, j, (r, w, starts), a)
                portions.append(self.attention.adjoint(again, x, y, q, j, a, p, g_value, s, b, o))
            g_query = torch.cat(portions)
        if self.is_first:
            return []
        return self.before_adjoint(state, scale, both, g_value, g_query, g)


class FusedTransformer(nn.Module):
    """Energy and direct force of every atom, with the weights of a trained network, and the gradient of the energy.

    Parameters
    ----------
    network : SE3Transformer
        Trained network; it is left as it was.
    """

    energy_shift: Tensor
    embedding: Tensor

    def __init__(self, network: SE3Transformer) -> None:
        super().__init__()
        dtype = network.energy_scale.dtype
        # Tables and merged weights are computed in float64 and rounded once.
        source = copy.deepcopy(network).to(torch.float64)
        self.cutoff = network.cutoff
        self.portions_turned_cpu = PORTIONS_TURNED_CPU
        self.geometry = FusedGeometry(network.cutoff)
        self.spline = SplineBasis(network.cutoff, N_INTERVALS)
        layers = [FusedLayer(cast(TransformerLayer, layer), source.basis) for layer in source.layers]
        self.layers, self.last = nn.ModuleList(layers[:-1]), layers[-1]
        self.readout = FusedReadout(source.energy_readout, source.force_readout, source.final_norm, source.energy_scale, source.force_scale)
        self.repulsion = TabulatedRepulsion(source.repulsion)
        self.register_buffer("embedding", source.embedding.weight.detach().clone().unsqueeze(1))
        self.register_buffer("energy_shift", source.energy_shift.clone())
        self.to(dtype)
        self.requires_grad_(False)

    def forward(self, species: Tensor, displacement: Tensor, neighbors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Arguments and results as in `SE3Transformer.forward`."""
        distance, u, coupling, log_cutoff = self.geometry(displacement, mask)
        spline = self.spline(distance.view(-1))
        state = [self.embedding.index_select(0, species)]
        for layer in self.layers:
            state, _, _ = layer(state, neighbors, spline, coupling, log_cutoff)
        state, _, _ = self.last(state, neighbors, spline, coupling, log_cutoff)
        energy, force, _ = self.readout(state)
        repulsion_energy, repulsion_force = self.repulsion(species, neighbors, distance, u, mask)
        return energy + self.energy_shift.index_select(0, species) + repulsion_energy, force + repulsion_force

    @torch.jit.export
    def energy_and_gradient(self, species: Tensor, displacement: Tensor, neighbors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The results of `forward`, and the gradient of the summed energies without the help of autograd, by the adjoint of every module.

        Parameters
        ----------
        species, displacement, neighbors, mask : Tensor
            As in `SE3Transformer.forward`.

        Returns
        -------
        tuple of Tensor
            Energies ``(n_atoms,)`` eV and direct forces ``(n_atoms, 3)`` eV/Angstrom; and the derivative of the sum of the energies by the
            displacements, ``(n_atoms, max_neighbors, 3)`` eV/Angstrom in their precision. It is that of the tabulated functions, exactly.
        """
        with torch.no_grad():
            distance, u, coupling, log_cutoff = self.geometry(displacement, mask)
            spline = self.spline(distance.view(-1), True)
            states = [[self.embedding.index_select(0, species)]]
            of_atoms: list[list[Tensor]] = []
            of_edges: list[list[Tensor]] = []
            for layer in self.layers:
                after, atoms, edges = layer(states[-1], neighbors, spline, coupling, log_cutoff, True)
                states.append(after)
                of_atoms.append(atoms)
                of_edges.append(edges)
            g_slots = torch.zeros_like(coupling.select(2, 0).select(1, 0))
            g_coupling = torch.zeros([coupling.shape[0], coupling.shape[1] - 1, coupling.shape[2] - 1], dtype=coupling.dtype, device=coupling.device)
            g_log_cutoff = torch.zeros_like(log_cutoff.squeeze(2))
            energy, force, g = self._turn(states[-1], neighbors, spline, coupling, log_cutoff, g_slots, g_coupling, g_log_cutoff)
            repulsion_energy, repulsion_force, g_distance = self.repulsion.evaluate(species, neighbors, distance, u, mask, True)
            energy = energy + self.energy_shift.index_select(0, species) + repulsion_energy
            force = force + repulsion_force
            for _ in range(len(of_atoms)):
                index = len(of_atoms) - 1
                state, atoms, edges = states[index], of_atoms.pop(), of_edges.pop()
                # From the last to the first: TorchScript runs through a ModuleList in its own order alone.
                for i, module in enumerate(self.layers):
                    if i == index:
                        g = module.adjoint(state, atoms, edges, neighbors, spline, coupling, g, g_slots, g_coupling, g_log_cutoff)  # type: ignore[operator]
            g_distance = g_distance + (g_slots * self.spline.per_length).view(g_distance.shape)
            return energy, force, self.geometry.adjoint(distance, u, mask, g_distance, g_coupling, g_log_cutoff)

    def _turn(
        self,
        state: list[Tensor],
        neighbors: Tensor,
        spline: tuple[Tensor, Tensor, Tensor],
        coupling: Tensor,
        log_cutoff: Tensor,
        g_slots: Tensor,
        g_coupling: Tensor,
        g_log_cutoff: Tensor,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The last layer, there and back at once: what follows its attention is done by every atom on its own.

        Energies, forces, and the cotangent of the state before the layer; arguments as in `FusedLayer.forward` and `FusedLayer.adjoint`.
        """
        layer = self.last
        scale, both, value, query = layer.before(state)
        n_atoms, k = neighbors.shape[0], neighbors.shape[1]
        portion = n_atoms if layer.keeps(neighbors) else layer.portion(neighbors)
        edges = portion * k
        turned = portion if neighbors.is_cuda else portion * self.portions_turned_cpu
        g_value = torch.zeros_like(value)
        energies: list[Tensor] = []
        forces: list[Tensor] = []
        g_queries: list[Tensor] = []
        g_scalars: list[Tensor] = []
        g_vectors: list[Tensor] = []
        for start in range(0, n_atoms, turned):
            n = min(turned, n_atoms - start)
            q, j = query.narrow(0, start, n).split(portion), neighbors.narrow(0, start, n).split(portion)
            rows, weights = _edges(spline[0], start, n, k).split(edges), _edges(spline[1], start, n, k).split(edges)
            a = _edges(coupling, start, n, k).split(edges)
            c = log_cutoff.narrow(0, start, n).split(portion)
            gathered: list[Tensor] = []
            alphas: list[Tensor] = []
            of_edges: list[list[Tensor]] = []
            for i in range(len(q)):
                starts = spline[2].narrow(0, 0, rows[i].shape[0] * rows[i].shape[1])
                one, alpha, made = layer.attention(q[i], value, j[i], (rows[i], weights[i], starts), a[i], c[i])
                gathered.append(one)
                alphas.append(alpha)
                of_edges.append(made)
            middle = layer.add([degree.narrow(0, start, n) for degree in state], _joined(gathered))
            after, of_interaction = layer.self_interaction(middle)
            energy, force, of_readout = self.readout(after)
            g = self.readout.adjoint(after, of_readout)
            # Degree 2, where a single layer ends with it, reaches the energy through the self-interaction alone.
            for degree in range(len(g), len(after)):
                g.append(torch.zeros_like(after[degree]))
            g = layer.self_interaction.adjoint(middle, of_interaction, g)
            t, b = _edges(g_slots, start, n, k).split(edges), _edges(g_coupling, start, n, k).split(edges)
            o, g_gathered = g_log_cutoff.narrow(0, start, n).split(portion), layer.add.adjoint(g).split(portion)
            for i in range(len(q)):
                g_queries.append(
                    layer.attention.adjoint(of_edges[i], alphas[i], gathered[i], q[i], j[i], a[i], g_gathered[i], g_value, t[i], b[i], o[i])
                )
            energies.append(energy)
            forces.append(force)
            g_scalars.append(g[0])
            g_vectors.append(g[1])
        g = [_joined(g_scalars), _joined(g_vectors)]
        if not layer.is_first:  # nothing before the first depends on the positions
            g = layer.before_adjoint(state, scale, both, g_value, _joined(g_queries), g)
        return _joined(energies), _joined(forces), g
