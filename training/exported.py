"""The module that is exported: neighbours, units and the network behind the contract of `torchscript_models/README.md`."""

import torch
from torch import Tensor, nn

from training.network import AnyNetwork
from training.network.rigid import remove_net_force_and_torque
from training.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV


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
    network : SE3Transformer or ReferenceTransformer
        Trained network, in evaluation mode.
    atomic_numbers : sequence of int
        Elements in the order of the species index.
    """

    species_of_number: Tensor

    def __init__(self, network: AnyNetwork, atomic_numbers: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.cutoff_nm = network.cutoff / ANGSTROM_PER_NM
        self.angstrom_per_nm = ANGSTROM_PER_NM
        self.kj_per_mol_per_ev = KJ_PER_MOL_PER_EV
        species = torch.full((256,), -1, dtype=torch.int64)
        species[list(atomic_numbers)] = torch.arange(len(atomic_numbers))
        self.register_buffer("species_of_number", species)

    def _evaluate(self, positions: Tensor, atomic_numbers: Tensor, box_vectors: Tensor | None) -> tuple[Tensor, Tensor]:
        """Energy () float64 kJ/mol and direct forces ``(n_atoms, 3)`` kJ/mol/nm, before net force and torque are removed."""
        if positions.dim() != 2 or positions.shape[1] != 3 or positions.shape[0] != atomic_numbers.shape[0]:
            raise ValueError("positions must be (n_atoms, 3) and atomic_numbers (n_atoms,)")
        species = self.species_of_number[atomic_numbers]
        x = positions.detach()
        box = box_vectors
        if box is not None:
            box = box.to(positions)
            # On a GPU a comparison here would stall the device at every step; there the small box becomes NaN below.
            smallest = torch.minimum(torch.minimum(box[0, 0], box[1, 1]), box[2, 2])
            if not box.is_cuda and float(smallest) < 2 * self.cutoff_nm:
                raise ValueError("the periodic box is too small: each diagonal element must be at least twice the cutoff of the model")
        neighbors, mask = neighbor_matrix(x, box, self.cutoff_nm, max(1, 16777216 // max(1, x.shape[0])))
        displacement = positions[neighbors] - positions.unsqueeze(1)
        if box is not None:
            displacement = minimum_image(displacement, box)
        # The network takes distances in the precision of the positions, but not below its own.
        if self.network.energy_scale.dtype == torch.float64:
            displacement = displacement.to(torch.float64)
        displacement = displacement * self.angstrom_per_nm
        energy, forces = self.network(species.clamp_min(0), displacement, neighbors, mask)
        # An element the model does not know, a coordinate that is not finite (it has no neighbours, so it would look like an
        # isolated atom), or on a GPU a box that is too small: none may ever give a plausible number.
        usable = (species >= 0).all() & torch.isfinite(x).all()
        if box is not None:
            usable = usable & (torch.minimum(torch.minimum(box[0, 0], box[1, 1]), box[2, 2]) >= 2 * self.cutoff_nm)
        factor = torch.where(usable, self.kj_per_mol_per_ev, float("nan")).to(torch.float64)
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
