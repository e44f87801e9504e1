"""The module that is exported: neighbours, units and the network behind the contract of `torchscript_models/README.md`."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from training.fused import FusedTransformer
from training.network import AnyNetwork, SE3Transformer
from training.network.rigid import remove_net_force_and_torque
from training.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV

if TYPE_CHECKING:
    from training.committee import CommitteeNetwork

#: Up to here, comparing all pairs of atoms in the network costs less than listing those within the cutoff.
FEW_ATOMS = 32


def minimum_image(displacement: Tensor, box: Tensor) -> Tensor:
    """Shortest lattice image of displacements in a box of OpenMM's reduced form.

    Rows are removed from the last to the first, which finds every image shorter than half the smallest diagonal element.

    Parameters
    ----------
    displacement : Tensor
        ``(..., 3)``.
    box : Tensor
        ``(3, 3)``, rows a, b, c, lower triangular.
    """
    displacement = displacement - torch.round(displacement[..., 2:3] / box[2, 2]) * box[2]
    displacement = displacement - torch.round(displacement[..., 1:2] / box[1, 1]) * box[1]
    return displacement - torch.round(displacement[..., 0:1] / box[0, 0]) * box[0]


def all_others(positions: Tensor, box: Tensor | None, cutoff: float) -> tuple[Tensor, Tensor]:
    """Every atom as a neighbour of every other, those beyond the cutoff masked: quickest for a few dozen atoms, of fixed shape.

    Parameters and result as in `neighbor_matrix`; at least 2 atoms.
    """
    n_atoms = positions.shape[0]
    slot = torch.arange(n_atoms - 1, device=positions.device).unsqueeze(0)
    neighbors = slot + (slot >= torch.arange(n_atoms, device=positions.device).unsqueeze(1)).to(torch.int64)
    d = positions.index_select(0, neighbors.view(-1)).view(n_atoms, n_atoms - 1, 3) - positions.unsqueeze(1)
    if box is not None:
        d = minimum_image(d, box)
    return neighbors, (d * d).sum(-1) < cutoff * cutoff


def neighbor_matrix(positions: Tensor, box: Tensor | None, cutoff: float, rows_at_once: int) -> tuple[Tensor, Tensor]:
    """All neighbours within the cutoff, one row per atom; brute force over all pairs, exact, no pair is ever dropped.

    Parameters
    ----------
    positions : Tensor
        ``(n_atoms, 3)``.
    box : Tensor or None
        ``(3, 3)`` in reduced form, each diagonal element at least twice the cutoff; None without periodic boundaries.
    cutoff : float
        In the unit of `positions`.
    rows_at_once : int
        Rows compared at once, which bounds the memory.

    Returns
    -------
    tuple of Tensor
        Indices ``(n_atoms, max_neighbors)`` int64, 0 on padding, and the bool mask; at least one column.
    """
    n_atoms = positions.shape[0]
    index = torch.arange(n_atoms, device=positions.device)
    receivers: list[Tensor] = []
    senders: list[Tensor] = []
    for start in range(0, n_atoms, rows_at_once):
        rows = index[start : start + rows_at_once]
        d = positions.unsqueeze(0) - positions[rows].unsqueeze(1)
        if box is not None:
            d = minimum_image(d, box)
        close = ((d * d).sum(-1) < cutoff * cutoff) & (index.unsqueeze(0) != rows.unsqueeze(1))
        pair = torch.nonzero(close)
        receivers.append(pair[:, 0] + start)
        senders.append(pair[:, 1])
    receiver, sender = torch.cat(receivers), torch.cat(senders)
    counts = torch.zeros(n_atoms, dtype=torch.int64, device=positions.device).index_add(0, receiver, torch.ones_like(receiver))
    width = max(int(counts.max()), 1)
    # nonzero lists pairs row by row, so a pair's column is its rank within its row.
    column = torch.arange(receiver.shape[0], device=positions.device) - (torch.cumsum(counts, 0) - counts)[receiver]
    neighbors = torch.zeros(n_atoms * width, dtype=torch.int64, device=positions.device)
    neighbors = neighbors.index_copy(0, receiver * width + column, sender).view(n_atoms, width)
    mask = torch.arange(width, device=positions.device).unsqueeze(0) < counts.unsqueeze(1)
    return neighbors, mask


class ExportedModel(nn.Module):
    """Format 1 of the contract: positions in nm in, energy in kJ/mol and forces in kJ/mol/nm out.

    Parameters
    ----------
    network : SE3Transformer, ReferenceTransformer or CommitteeNetwork
        Trained, in evaluation mode.
    atomic_numbers : sequence of int
        Elements in the order of the species index.
    """

    species_of_number: Tensor
    poison_of_number: Tensor

    def __init__(self, network: "AnyNetwork | CommitteeNetwork", atomic_numbers: tuple[int, ...]) -> None:
        super().__init__()
        self.network = FusedTransformer(network) if isinstance(network, SE3Transformer) else network
        self.few_atoms = FEW_ATOMS
        self.cutoff_nm = network.cutoff / ANGSTROM_PER_NM
        self.angstrom_per_nm = ANGSTROM_PER_NM
        self.kj_per_mol_per_ev = KJ_PER_MOL_PER_EV
        species = torch.zeros(256, dtype=torch.int64)
        species[list(atomic_numbers)] = torch.arange(len(atomic_numbers))
        self.register_buffer("species_of_number", species)
        poison = torch.full((256,), torch.nan, dtype=torch.get_default_dtype())
        poison[list(atomic_numbers)] = 0.0
        self.register_buffer("poison_of_number", poison)

    def _evaluate(self, positions: Tensor, atomic_numbers: Tensor, box_vectors: Tensor | None) -> tuple[Tensor, Tensor]:
        """Energy () float64 kJ/mol and direct forces ``(n_atoms, 3)`` kJ/mol/nm, before net force and torque are removed."""
        if positions.dim() != 2 or positions.shape[1] != 3 or positions.shape[0] != atomic_numbers.shape[0]:
            raise ValueError("positions must be (n_atoms, 3) and atomic_numbers (n_atoms,)")
        species = self.species_of_number.index_select(0, atomic_numbers)
        x = positions.detach()
        box = box_vectors
        if box is not None:
            box = box.to(positions)
            # On a GPU a comparison here would stall the device at every step; there the small box becomes NaN below.
            if not box.is_cuda and float(torch.diagonal(box).amin()) < 2 * self.cutoff_nm:
                raise ValueError("the periodic box is too small: each diagonal element must be at least twice the cutoff of the model")
        if 2 <= x.shape[0] <= self.few_atoms:
            neighbors, mask = all_others(x, box, self.cutoff_nm)
        else:
            neighbors, mask = neighbor_matrix(x, box, self.cutoff_nm, max(1, 16777216 // max(1, x.shape[0])))
        displacement = positions.index_select(0, neighbors.view(-1)).view(neighbors.shape[0], neighbors.shape[1], 3) - positions.unsqueeze(1)
        if box is not None:
            displacement = minimum_image(displacement, box)
        # The network takes distances in the precision of the positions, but not below its own.
        if self.poison_of_number.dtype == torch.float64:
            displacement = displacement.to(torch.float64)
        displacement = displacement * self.angstrom_per_nm
        energy, forces = self.network(species, displacement, neighbors, mask)
        # An element that the model does not know, a coordinate that is not finite (it has no neighbours and would look like an isolated
        # atom), on a GPU also a box that is too small: none may ever give a plausible number. Zero times what is not finite is NaN.
        factor = 0.0 * x.sum() + self.poison_of_number.index_select(0, atomic_numbers).sum() + self.kj_per_mol_per_ev
        if box is not None:
            factor = torch.where(torch.diagonal(box).amin() >= 2 * self.cutoff_nm, factor, float("nan"))
        factor = factor.to(torch.float64)
        return energy.to(torch.float64).sum() * factor, forces.to(positions.dtype) * (factor * self.angstrom_per_nm).to(positions.dtype)

    def forward(self, positions: Tensor, atomic_numbers: Tensor, box_vectors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Energy and direct forces; no gradient is recorded.

        Parameters
        ----------
        positions : Tensor
            ``(n_atoms, 3)`` nm, float32 or float64.
        atomic_numbers : Tensor
            ``(n_atoms,)`` int64.
        box_vectors : Tensor or None
            ``(3, 3)`` nm, rows, OpenMM's reduced form.

        Returns
        -------
        tuple of Tensor
            Energy () float64 kJ/mol relative to isolated atoms, and forces ``(n_atoms, 3)`` kJ/mol/nm, contiguous, dtype and
            device of `positions`, with no net force and, without a box, no net torque.
        """
        device = positions.device
        home = self.species_of_number.device
        with torch.no_grad():
            # OpenMM's CPU kernels ask for gradients of the positions always; without detach the interpreter would prepare for them.
            x = positions.detach().to(home)
            energy, forces = self._evaluate(x, atomic_numbers.to(home), box_vectors)
            forces = remove_net_force_and_torque(forces, x, box_vectors is None)
        return energy.to(device), forces.to(device).contiguous()

    @torch.jit.export
    def energy(self, positions: Tensor, atomic_numbers: Tensor, box_vectors: Tensor | None = None) -> Tensor:
        """Energy alone, differentiable in `positions`; arguments as in `forward`."""
        home = self.species_of_number.device
        energy, _ = self._evaluate(positions.to(home), atomic_numbers.to(home), box_vectors)
        return energy.to(positions.device)

    @torch.jit.export
    def energy_and_forces(self, positions: Tensor, atomic_numbers: Tensor, box_vectors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Results of `forward` from one evaluation, the energy differentiable in `positions`, the forces constants."""
        home = self.species_of_number.device
        x = positions.to(home)
        energy, forces = self._evaluate(x, atomic_numbers.to(home), box_vectors)
        with torch.no_grad():
            forces = remove_net_force_and_torque(forces, x, box_vectors is None)
        return energy.to(positions.device), forces.to(positions.device).contiguous()
