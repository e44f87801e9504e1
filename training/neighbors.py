"""Neighbours within a cutoff as a padded matrix, inside the exported model: exact under any box, no pair is ever dropped.

Three ways to the same matrix: all pairs in place (few atoms; a fixed shape), all pairs compared in portions, and a cell list, whose
cost is linear in the number of atoms.
"""

import torch
from torch import Tensor


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


def find_neighbors(positions: Tensor, box: Tensor | None, cutoff: float) -> tuple[Tensor, Tensor]:
    """All neighbours within the cutoff, one row per atom, by the way that suits the number of atoms.

    Parameters
    ----------
    positions : Tensor
        ``(n_atoms, 3)``; they need not be wrapped into the box.
    box : Tensor or None
        ``(3, 3)`` in reduced form, each diagonal element at least twice the cutoff; None without periodic boundaries.
    cutoff : float
        In the unit of `positions`.

    Returns
    -------
    tuple of Tensor
        Indices ``(n_atoms, max_neighbors)`` int64, in range on padding too, and the bool mask; at least one column.
    """
    n_atoms = positions.shape[0]
    # Measured on a CPU: up to 32 atoms it costs less to carry pairs beyond the cutoff through the network than to list the others. On a GPU
    # up to 128 atoms, since the others' number is known only after a synchronisation, in which no CUDA graph can be captured.
    if 2 <= n_atoms <= (128 if positions.is_cuda else 32):
        return all_others(positions, box, cutoff)
    if n_atoms < 1000:
        return neighbor_matrix(positions, box, cutoff)
    return cell_list(positions, box, cutoff)


def _is_close(displacement: Tensor, box: Tensor | None, cutoff: float) -> Tensor:
    if box is not None:
        displacement = minimum_image(displacement, box)
    return (displacement * displacement).sum(-1) < cutoff * cutoff


def _pairs_at_once(positions: Tensor) -> int:
    """Pairs compared at once: what fits in the cache of a processor, or in a small part of a GPU's memory."""
    return 16777216 if positions.is_cuda else 32768


def all_others(positions: Tensor, box: Tensor | None, cutoff: float) -> tuple[Tensor, Tensor]:
    """Every atom as a neighbour of every other, those beyond the cutoff masked; of fixed shape; at least 2 atoms.

    Parameters and result as in `find_neighbors`.
    """
    n_atoms = positions.shape[0]
    slot = torch.arange(n_atoms - 1, device=positions.device).unsqueeze(0)
    neighbors = slot + (slot >= torch.arange(n_atoms, device=positions.device).unsqueeze(1)).to(torch.int64)
    d = positions.index_select(0, neighbors.view(-1)).view(n_atoms, n_atoms - 1, 3) - positions.unsqueeze(1)
    return neighbors, _is_close(d, box, cutoff)


def _matrix(receiver: Tensor, sender: Tensor, n_atoms: int) -> tuple[Tensor, Tensor]:
    """Pairs, ascending by receiver, to the padded matrix and its mask."""
    counts = torch.zeros(n_atoms, dtype=torch.int64, device=receiver.device).index_add(0, receiver, torch.ones_like(receiver))
    width = max(int(counts.max()), 1)
    # The pairs come row by row, so a pair's column is its rank within its row.
    column = torch.arange(receiver.shape[0], device=receiver.device) - (torch.cumsum(counts, 0) - counts).index_select(0, receiver)
    neighbors = torch.zeros(n_atoms * width, dtype=torch.int64, device=receiver.device)
    neighbors = neighbors.index_copy(0, receiver * width + column, sender).view(n_atoms, width)
    return neighbors, torch.arange(width, device=receiver.device).unsqueeze(0) < counts.unsqueeze(1)


def neighbor_matrix(positions: Tensor, box: Tensor | None, cutoff: float) -> tuple[Tensor, Tensor]:
    """Compare all pairs, a portion of the rows at a time; parameters and result as in `find_neighbors`."""
    n_atoms = positions.shape[0]
    index = torch.arange(n_atoms, device=positions.device)
    receivers: list[Tensor] = []
    senders: list[Tensor] = []
    rows_at_once = max(1, _pairs_at_once(positions) // n_atoms)
    for start in range(0, n_atoms, rows_at_once):
        rows = index[start : start + rows_at_once]
        close = _is_close(positions.unsqueeze(0) - positions[rows].unsqueeze(1), box, cutoff) & (index.unsqueeze(0) != rows.unsqueeze(1))
        pair = torch.nonzero(close)
        receivers.append(pair[:, 0] + start)
        senders.append(pair[:, 1])
    return _matrix(torch.cat(receivers), torch.cat(senders), n_atoms)


def cell_list(positions: Tensor, box: Tensor | None, cutoff: float) -> tuple[Tensor, Tensor]:
    """Sort the atoms into cells no narrower than the cutoff and compare each with those of the 27 cells around it.

    A box with fewer than three cells along an edge is left to `neighbor_matrix`. Parameters and result as in `find_neighbors`.
    """
    n_atoms, device = positions.shape[0], positions.device
    if box is not None:
        # Distances between opposite faces: volume over the area of the face.
        a, b, c = box[0], box[1], box[2]
        areas = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)]).square().sum(1).sqrt()
        heights = box[0, 0] * box[1, 1] * box[2, 2] / areas
        # Fractional coordinates by forward substitution: the box is lower triangular.
        fz = positions[:, 2] / box[2, 2]
        fy = (positions[:, 1] - fz * box[2, 1]) / box[1, 1]
        fx = (positions[:, 0] - fz * box[2, 0] - fy * box[1, 0]) / box[0, 0]
        fractional = torch.stack([fx, fy, fz], dim=1)
        fractional = fractional - torch.floor(fractional)
    else:
        low = positions.amin(0)
        heights = (positions.amax(0) - low).clamp_min(cutoff) * (1.0 + 1e-6)
        fractional = (positions - low) / heights
    # A lone atom far away must not make billions of empty cells; wider cells are as right as narrow ones.
    most = max(3.0, (8.0 * n_atoms) ** (1.0 / 3.0))
    # The allowance for rounding: a cell a hair narrower than the cutoff would lose pairs.
    n_cells = torch.floor(heights / (cutoff * (1.0 + 1e-6))).clamp(1.0, most).to(torch.int64)
    # A position that is not finite is in no cell; zero keeps the index in range, and the energy becomes NaN elsewhere.
    place = torch.nan_to_num(fractional * n_cells, 0.0, 0.0, 0.0).to(torch.int64).clamp_min(0)
    place = torch.minimum(place, n_cells - 1)
    if box is not None and int(n_cells.min()) < 3:
        return neighbor_matrix(positions, box, cutoff)
    # Without a box one empty layer all around stands for the outside.
    layer = 0 if box is not None else 1
    shape = n_cells + 2 * layer
    ny, nz = int(shape[1]), int(shape[2])
    total = int(shape[0]) * ny * nz
    place = place + layer
    cell = (place[:, 0] * ny + place[:, 1]) * nz + place[:, 2]
    counts = torch.zeros(total, dtype=torch.int64, device=device).index_add(0, cell, torch.ones_like(cell))
    capacity = int(counts.max())
    order = torch.argsort(cell, stable=True)
    rank = torch.arange(n_atoms, device=device) - (torch.cumsum(counts, 0) - counts).index_select(0, cell.index_select(0, order))
    # Row of a cell: the atoms in it, then n_atoms, an atom that does not exist.
    members = torch.full([total * capacity], n_atoms, dtype=torch.int64, device=device)
    members = members.index_copy(0, cell.index_select(0, order) * capacity + rank, order).view(total, capacity)
    step = torch.arange(-1, 2, device=device)
    around = torch.stack(torch.meshgrid([step, step, step], indexing="ij"), dim=-1).view(27, 3)
    # Far away, so that a slot without an atom is never close; NaN is not close to anything.
    padded = torch.cat([positions, torch.full([1, 3], float("nan"), dtype=positions.dtype, device=device)])
    receivers: list[Tensor] = []
    senders: list[Tensor] = []
    rows_at_once = max(1, _pairs_at_once(positions) // (27 * capacity))
    for start in range(0, n_atoms, rows_at_once):
        rows = torch.arange(start, min(start + rows_at_once, n_atoms), device=device)
        near = place[rows].unsqueeze(1) + around
        if box is not None:
            near = torch.remainder(near, n_cells)
        near_cells = (near[:, :, 0] * ny + near[:, :, 1]) * nz + near[:, :, 2]
        candidates = members.index_select(0, near_cells.view(-1)).view(rows.shape[0], -1)
        d = padded.index_select(0, candidates.view(-1)).view(rows.shape[0], -1, 3) - positions[rows].unsqueeze(1)
        pair = torch.nonzero(_is_close(d, box, cutoff) & (candidates != rows.unsqueeze(1)))
        receivers.append(pair[:, 0] + start)
        senders.append(candidates[pair[:, 0], pair[:, 1]])
    return _matrix(torch.cat(receivers), torch.cat(senders), n_atoms)
