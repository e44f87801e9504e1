"""The whole network in its inference form; `FusedTransformer.forward` has the signature of `SE3Transformer.forward`."""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from training.fused.attention import FusedAttention, FusedFirstAttention
from training.fused.edges import EdgeCotangents, Edges, FusedGeometry, cotangents_in_portions, in_order, in_portions, order_by_width, without_slopes
from training.fused.nodes import AddedLinear, FusedReadout, FusedSelfInteraction, JointScale, MergedLinear, joined
from training.fused.repulsion import TabulatedRepulsion
from training.fused.spline import SplineBasis
from training.network import SE3Transformer
from training.network.radial import BesselBasis
from training.network.transformer import TransformerLayer

N_INTERVALS = 512
#: Edges treated at once by each thread of a processor: so many that calls cost little beside the numbers, so few that what is made of them stays in
#: its last cache. On a GPU only memory bounds it.
EDGES_AT_ONCE_CPU = 1024
EDGES_AT_ONCE_GPU = 2_000_000
#: With more edges than these, the gradient computes the messages again, portion by portion, in place of keeping some 10 kB for each edge.
EDGES_KEPT_CPU = 50_000
EDGES_KEPT_GPU = 200_000
#: Portions of one thread that the last layer goes there and back with at once: what atoms do on their own costs less for many, but the edges
#: wait for it in memory. A portion of several threads, or of a GPU, is large enough.
PORTIONS_TURNED_CPU = 4


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
        self.scale = JointScale(layer.norm)
        self.value_query = MergedLinear([attention.value, attention.query], layer.norm)
        self.is_first = attention.messages.degree_in == 0
        # Degrees 0 .. of the features, 2 l + 1 components each, and how many components a query has.
        self.components = [2 * degree + 1 for degree in range(attention.messages.degree_in + 1)]
        self.asked = sum(2 * degree + 1 for degree in range(len(attention.query.maps)))
        self.attention = (FusedFirstAttention if self.is_first else FusedAttention)(attention, basis, N_INTERVALS)
        self.add = AddedLinear(attention.out, len(layer.norm.gains))
        self.self_interaction = FusedSelfInteraction(layer.self_interaction, layer.norm_after)

    def before(self, state: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scale of the norm, values and queries side by side, values, queries."""
        scale = self.scale(state)
        both = joined(self.value_query(state), 1) * scale
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
        self, state: list[Tensor], edges: list[Edges], keep: bool = False, keep_messages: bool = False
    ) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
        """State before to state after.

        Parameters
        ----------
        state : list of Tensor
            One per degree.
        edges : list of Edges
            Of all receivers, in portions, the splines with slopes if messages are kept.
        keep : bool
            Whether `adjoint` is to follow.
        keep_messages : bool
            Whether it is to find what was made of the edges, or to make it again.

        Returns
        -------
        tuple
            The state, and what `adjoint` needs of atoms, and of the edges of each portion.
        """
        scale, both, value, query = self.before(state)
        portions: list[Tensor] = []
        of_edges: list[list[Tensor]] = []
        for q, portion in zip(query.split(edges[0].neighbors.shape[0]), edges):  # noqa: B905 - TorchScript knows no strict=
            one, alpha, made = self.attention(q, value, portion if keep_messages else without_slopes(portion))
            portions.append(one)
            if keep_messages:
                of_edges.append([alpha] + made)  # noqa: RUF005 - TorchScript knows no unpacking
            elif keep:
                of_edges.append([alpha])
        gathered = joined(portions, 0)
        middle = self.add(state, gathered)
        out, of_interaction = self.self_interaction(middle)
        return out, [scale, both, value, gathered] + middle + of_interaction, of_edges  # noqa: RUF005

    def adjoint(
        self,
        state: list[Tensor],
        of_atoms: list[Tensor],
        of_edges: list[list[Tensor]],
        edges: list[Edges],
        g: list[Tensor],
        g_edges: list[EdgeCotangents],
    ) -> list[Tensor]:
        """Cotangent of the state after to that of the state before.

        Parameters
        ----------
        state : list of Tensor
            As given to `forward`.
        of_atoms, of_edges
            From `forward`.
        edges : list of Edges
            As given to `forward`, the splines with slopes.
        g : list of Tensor
            Cotangent of the state after.
        g_edges : list of EdgeCotangents
            To which those of the edges are added.

        Returns
        -------
        list of Tensor
            One per degree; empty for the first layer, whose state does not depend on the positions.
        """
        scale, both, value, gathered = of_atoms[0], of_atoms[1], of_atoms[2], of_atoms[3]
        query = both.narrow(2, self.channels, self.channels).narrow(1, 0, self.asked)
        n_degrees = len(g)
        g = self.self_interaction.adjoint(of_atoms[4 : 4 + n_degrees], of_atoms[4 + n_degrees :], g)
        g_gathered = self.add.adjoint(g)
        g_value = torch.zeros_like(value)
        g_query: list[Tensor] = []
        at_once = edges[0].neighbors.shape[0]
        for q, portion, saved, x, p, g_portion in zip(  # noqa: B905 - TorchScript knows no strict=
            query.split(at_once), edges, of_edges, gathered.split(at_once), g_gathered.split(at_once), g_edges
        ):
            made = saved[1:] if len(saved) > 1 else self.attention.make(q, value, portion)
            g_query.append(self.attention.adjoint(made, saved[0], x, q, portion, p, g_value, g_portion))
        if self.is_first:
            return []
        return self.before_adjoint(state, scale, both, g_value, joined(g_query, 0), g)


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
        self.threads = 1  # of the processor; whoever evaluates with more sets it
        self.portions_turned_cpu = PORTIONS_TURNED_CPU
        self.edges_at_once_cpu, self.edges_at_once_gpu = EDGES_AT_ONCE_CPU, EDGES_AT_ONCE_GPU
        self.edges_kept_cpu, self.edges_kept_gpu = EDGES_KEPT_CPU, EDGES_KEPT_GPU
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

    def receivers_at_once(self, neighbors: Tensor) -> int:
        """Receivers of a portion."""
        return max(1, (self.edges_at_once_gpu if neighbors.is_cuda else self.edges_at_once_cpu * self.threads) // neighbors.shape[1])

    def forward(self, species: Tensor, displacement: Tensor, neighbors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Arguments and results as in `SE3Transformer.forward`."""
        if self.receivers_at_once(neighbors) >= neighbors.shape[0]:
            return self._forward(species, displacement, neighbors, mask)
        order, place = order_by_width(mask)
        atoms = in_order(order, place, species, displacement, neighbors, mask)
        energy, force = self._forward(atoms[0], atoms[1], atoms[2], atoms[3])
        return energy.index_select(0, place), force.index_select(0, place)

    def _forward(self, species: Tensor, displacement: Tensor, neighbors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        distance, u, coupling, log_cutoff = self.geometry(displacement, mask)
        spline = self.spline(distance.view(-1))
        edges = in_portions(neighbors, spline, coupling, log_cutoff, mask, self.receivers_at_once(neighbors))
        state = [self.embedding.index_select(0, species)]
        for layer in self.layers:
            state, _, _ = layer(state, edges)
        state, _, _ = self.last(state, edges)
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
            if self.receivers_at_once(neighbors) >= neighbors.shape[0]:
                return self._energy_and_gradient(species, displacement, neighbors, mask)
            order, place = order_by_width(mask)
            atoms = in_order(order, place, species, displacement, neighbors, mask)
            energy, force, gradient = self._energy_and_gradient(atoms[0], atoms[1], atoms[2], atoms[3])
            return energy.index_select(0, place), force.index_select(0, place), gradient.index_select(0, place)

    def keeps(self, neighbors: Tensor) -> bool:
        """Whether the gradient uses what the way to the energy made of the edges."""
        return neighbors.numel() <= (self.edges_kept_gpu if neighbors.is_cuda else self.edges_kept_cpu)

    def _energy_and_gradient(self, species: Tensor, displacement: Tensor, neighbors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distance, u, coupling, log_cutoff = self.geometry(displacement, mask)
        spline = self.spline(distance.view(-1), True)
        kept = self.keeps(neighbors)
        edges = in_portions(neighbors, spline, coupling, log_cutoff, mask, self.receivers_at_once(neighbors))
        states = [[self.embedding.index_select(0, species)]]
        of_atoms: list[list[Tensor]] = []
        of_edges: list[list[list[Tensor]]] = []
        for layer in self.layers:
            after, of_atom, of_edge = layer(states[-1], edges, True, kept)
            states.append(after)
            of_atoms.append(of_atom)
            of_edges.append(of_edge)
        g_whole = self.geometry.no_cotangents(log_cutoff)
        g_edges = cotangents_in_portions(g_whole, edges)
        energy, force, g = self._turn(states[-1], edges, g_edges)
        repulsion_energy, repulsion_force, g_distance = self.repulsion.evaluate(species, neighbors, distance, u, mask, True)
        energy = energy + self.energy_shift.index_select(0, species) + repulsion_energy
        force = force + repulsion_force
        for _ in range(len(of_atoms)):
            index = len(of_atoms) - 1
            state, of_atom, of_edge = states[index], of_atoms.pop(), of_edges.pop()
            # From the last to the first: TorchScript runs through a ModuleList in its own order alone.
            for i, module in enumerate(self.layers):
                if i == index:
                    g = module.adjoint(state, of_atom, of_edge, edges, g, g_edges)  # type: ignore[operator]
        g_distance = g_distance + g_whole.slots * self.spline.per_length
        return energy, force, self.geometry.adjoint(distance, u, mask, g_distance, g_whole)

    def _turn(self, state: list[Tensor], edges: list[Edges], g_edges: list[EdgeCotangents]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The last layer, there and back at once: what follows its attention is done by every atom on its own.

        Energies, forces, and the cotangent of the state before the layer; arguments as in `FusedLayer.adjoint`.
        """
        layer = self.last
        scale, both, value, query = layer.before(state)
        g_value = torch.zeros_like(value)
        energies: list[Tensor] = []
        forces: list[Tensor] = []
        g_queries: list[Tensor] = []
        g_scalars: list[Tensor] = []
        g_vectors: list[Tensor] = []
        at_once = edges[0].neighbors.shape[0]
        queries = query.split(at_once)
        n_turned = 1 if query.is_cuda else max(1, self.portions_turned_cpu // self.threads)
        states = [degree.split(at_once * n_turned) for degree in state]
        for i in range(len(states[0])):
            first = i * n_turned
            turned = edges[first : first + n_turned]
            gathered: list[Tensor] = []
            of_edges: list[list[Tensor]] = []
            for q, portion in zip(queries[first:], turned):  # noqa: B905 - TorchScript knows no strict=
                one, alpha, made = layer.attention(q, value, portion)
                gathered.append(one)
                of_edges.append([alpha] + made)  # noqa: RUF005 - TorchScript knows no unpacking
            middle = layer.add([degree[i] for degree in states], joined(gathered, 0))
            after, of_interaction = layer.self_interaction(middle)
            energy, force, of_readout = self.readout(after)
            g = self.readout.adjoint(after, of_readout)
            # Degree 2, where a single layer ends with it, reaches the energy through the self-interaction alone.
            for degree in range(len(g), len(after)):
                g.append(torch.zeros_like(after[degree]))
            g = layer.self_interaction.adjoint(middle, of_interaction, g)
            for q, portion, saved, x, p, g_portion in zip(  # noqa: B905
                queries[first:], turned, of_edges, gathered, layer.add.adjoint(g).split(at_once), g_edges[first:]
            ):
                g_queries.append(layer.attention.adjoint(saved[1:], saved[0], x, q, portion, p, g_value, g_portion))
            energies.append(energy)
            forces.append(force)
            g_scalars.append(g[0])
            g_vectors.append(g[1])
        g = [joined(g_scalars, 0), joined(g_vectors, 0)]
        if not layer.is_first:  # nothing before the first depends on the positions
            g = layer.before_adjoint(state, scale, both, g_value, joined(g_queries, 0), g)
        return joined(energies, 0), joined(forces, 0), g
