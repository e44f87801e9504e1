"""Neighbours within a cutoff as a padded matrix, inside the exported model: exact under any box, no pair is ever dropped.

Four ways to the same matrix: all pairs in place (few atoms), all pairs compared in portions, a cell list, whose cost is linear in the number of
atoms, and, for CUDA graphs, a matrix of given width. The first and the last have shapes that do not depend on the positions.
"""

import torch
from torch import Tensor


def minimum_image(x: Tensor, y: Tensor, z: Tensor, box: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shortest lattice image of displacements in a box of OpenMM's reduced form.

    Rows are removed from the last to the first, which finds every image shorter than half the smallest diagonal element.

    Parameters
    ----------
    x, y, z : Tensor
        Components, of one shape. Apart, because a processor is twice as fast at long rows of numbers as at three in a row.
    box : Tensor
        ``(3, 3)``, rows a, b, c, lower triangular.
    """
    # Whole rows, also what is zero above the diagonal: a strain makes it differ from zero, and autograd asks for the derivative by that.
    whole = torch.round(z / box[2, 2])
    x, y, z = x - whole * box[2, 0], y - whole * box[2, 1], z - whole * box[2, 2]
    whole = torch.round(y / box[1, 1])
    x, y, z = x - whole * box[1, 0], y - whole * box[1, 1], z - whole * box[1, 2]
    whole = torch.round(x / box[0, 0])
    return x - whole * box[0, 0], y - whole * box[0, 1], z - whole * box[0, 2]


def all_pairs_up_to(is_cuda: bool) -> int:
    """Atoms up to which pairs beyond the cutoff are carried through the network too.

    On a CPU that costs less, measured, than to list the others. On a GPU their number is known only after a synchronisation, which costs more, and in
    which no CUDA graph can be captured.
    """
    return 128 if is_cuda else 32


def fixed_width_up_to() -> int:
    """Atoms up to which a matrix of given width is made; beyond, computing takes longer than launching, and comparing all pairs costs too much."""
    return 2000


def listed_by_cells_from() -> int:
    """Atoms from which sorting them into cells costs less than comparing all pairs: 1,800 to 2,500 in water on a CPU, measured."""
    return 2000


def find_neighbors(positions: Tensor, box: Tensor | None, cutoff: float, capacity: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """All neighbours within the cutoff, one row per atom, by the way that suits the number of atoms.

    Parameters
    ----------
    positions : Tensor
        ``(n_atoms, 3)``; they need not be wrapped into the box.
    box : Tensor or None
        ``(3, 3)`` in reduced form, each diagonal element at least twice the cutoff; None without periodic boundaries.
    cutoff : float
        In the unit of `positions`.
    capacity : int
        Width of the matrix, taken where not all pairs are, up to `fixed_width_up_to()` atoms; 0 for as many columns as there are neighbours.

    Returns
    -------
    tuple of Tensor
        Indices ``(n_atoms, max_neighbors)`` int64, in range on padding too; displacements ``(n_atoms, max_neighbors, 3)``, of which autograd
        knows; the bool mask; at least one column. Last None, or, with a capacity, a number to add to the energy: 0, or NaN if an atom has
        more neighbours.
    """
    n_atoms = positions.shape[0]
    if 2 <= n_atoms <= all_pairs_up_to(positions.is_cuda):
        neighbors = all_others(n_atoms, positions.device)
        displacement = displacements(positions, neighbors, box)
        return neighbors, displacement, _is_within(displacement.detach(), cutoff), None
    x = positions.detach()
    if capacity > 0 and n_atoms <= fixed_width_up_to():
        neighbors, mask, excess = fixed_width(x, box, cutoff, capacity)
        return neighbors, displacements(positions, neighbors, box), mask, excess
    neighbors, mask = neighbor_matrix(x, box, cutoff) if n_atoms < listed_by_cells_from() else cell_list(x, box, cutoff)
    return neighbors, displacements(positions, neighbors, box), mask, None


def displacements(positions: Tensor, neighbors: Tensor, box: Tensor | None) -> Tensor:
    """x_j - x_i of the neighbours j ``(n_atoms, k)`` of every atom i, their nearest images in a box: ``(n_atoms, k, 3)``."""
    n, k = neighbors.shape[0], neighbors.shape[1]
    if box is None:
        return positions.index_select(0, neighbors.view(-1)).view(n, k, 3) - positions.unsqueeze(1)
    components = positions.t().contiguous()
    d = components.index_select(1, neighbors.view(-1)).view(3, n, k) - components.unsqueeze(2)
    x, y, z = minimum_image(d[0], d[1], d[2], box)
    return torch.stack([x, y, z], dim=2)


def _is_within(displacement: Tensor, cutoff: float) -> Tensor:
    return (displacement * displacement).sum(-1) < cutoff * cutoff


def _is_close(displacement: Tensor, box: Tensor | None, cutoff: float) -> Tensor:
    """Whether displacements ``(3, ...)``, or their nearest images, are shorter than the cutoff."""
    x, y, z = displacement[0], displacement[1], displacement[2]
    if box is not None:
        x, y, z = minimum_image(x, y, z, box)
    return x * x + y * y + z * z < cutoff * cutoff


def _pairs_at_once(positions: Tensor) -> int:
    """Pairs compared at once: what fits in the cache of a processor, or in a small part of a GPU's memory."""
    return 16777216 if positions.is_cuda else 32768


def all_others(n_atoms: int, device: torch.device) -> Tensor:
    """Every atom as a neighbour of every other, ``(n_atoms, n_atoms - 1)`` int64; at least 2 atoms."""
    slot = torch.arange(n_atoms - 1, device=device).unsqueeze(0)
    return slot + (slot >= torch.arange(n_atoms, device=device).unsqueeze(1)).to(torch.int64)


def fixed_width(positions: Tensor, box: Tensor | None, cutoff: float, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compare all pairs at once, and keep up to `capacity` neighbours of each atom; nothing is asked of the device.

    Parameters
    ----------
    positions, box, cutoff
        As in `find_neighbors`.
    capacity : int
        Columns.

    Returns
    -------
    tuple of Tensor
        Neighbours and mask ``(n_atoms, capacity)``, and (): 0, or NaN if an atom has more neighbours than that.
    """
    n_atoms = positions.shape[0]
    index = torch.arange(n_atoms, device=positions.device)
    components = positions.t()
    close = _is_close(components.unsqueeze(1) - components.unsqueeze(2), box, cutoff) & (index.unsqueeze(0) != index.unsqueeze(1))
    rank = torch.cumsum(close, 1)  # of a neighbour among those of its row, from 1
    # Whatever is none, or beyond the capacity, goes to a column that is then dropped.
    column = torch.where(close, rank - 1, capacity).clamp_max(capacity)
    neighbors = torch.zeros([n_atoms, capacity + 1], dtype=torch.int64, device=positions.device)
    neighbors = neighbors.scatter(1, column, index.unsqueeze(0).expand(n_atoms, n_atoms)).narrow(1, 0, capacity).contiguous()
    counts = rank.narrow(1, n_atoms - 1, 1)
    mask = torch.arange(1, capacity + 1, device=positions.device).unsqueeze(0) <= counts
    return neighbors, mask, torch.where(counts.amax() > capacity, float("nan"), 0.0)


def _matrix(receiver: Tensor, sender: Tensor, n_atoms: int) -> tuple[Tensor, Tensor]:
    """Pairs, ascending by receiver, to the padded matrix and its mask."""
    counts = torch.zeros(n_atoms, dtype=torch.int64, device=receiver.device).index_add(0, receiver, torch.ones_like(receiver))
    width = max(int(counts.max()), 1)
    if receiver.is_cuda:
        # At a new shape TorchScript compiles kernels for up to a second, until after some shapes it compiles them for any.
        width = (width + 3) // 4 * 4
    # The pairs come row by row, so a pair's column is its rank within its row.
    column = torch.arange(receiver.shape[0], device=receiver.device) - (torch.cumsum(counts, 0) - counts).index_select(0, receiver)
    neighbors = torch.zeros(n_atoms * width, dtype=torch.int64, device=receiver.device)
    neighbors = neighbors.index_copy(0, receiver * width + column, sender).view(n_atoms, width)
    return neighbors, torch.arange(width, device=receiver.device).unsqueeze(0) < counts.unsqueeze(1)


def neighbor_matrix(positions: Tensor, box: Tensor | None, cutoff: float) -> tuple[Tensor, Tensor]:
    """Compare all pairs, a portion of the rows at a time, with themselves and the rows after them; parameters and result as in `find_neighbors`."""
    n_atoms = positions.shape[0]
    components = positions.t().contiguous()
    close = torch.empty([n_atoms, n_atoms], dtype=torch.bool, device=positions.device)
    start = 0
    while start < n_atoms:
        end = min(n_atoms, start + max(1, _pairs_at_once(positions) // (n_atoms - start)))
        rows, rest = components.narrow(1, start, end - start), components.narrow(1, start, n_atoms - start)
        portion = _is_close(rest.unsqueeze(1) - rows.unsqueeze(2), box, cutoff)
        close[start:end, start:] = portion
        close[start:, start:end] = portion.t()
        start = end
    pair = torch.nonzero(close.fill_diagonal_(False))
    return _matrix(pair[:, 0], pair[:, 1], n_atoms)


def cell_list(positions: Tensor, box: Tensor | None, cutoff: float) -> tuple[Tensor, Tensor]:
    """Sort the atoms into cells no narrower than the cutoff and compare each with those of its cell and the cells around it.

    Parameters and result as in `find_neighbors`.
    """
    n_atoms, device = positions.shape[0], positions.device
    # As many as there may be empty ones. Beyond, cells of an unbounded space that far apart are one: what is compared in vain is found too far away.
    most = max(3.0, (8.0 * n_atoms) ** (1.0 / 3.0))
    # The allowance for rounding: a cell a hair narrower than the cutoff would lose pairs. What is not finite is in no cell; it is put into some, and
    # the energy becomes NaN elsewhere.
    if box is not None:
        # Distances between opposite faces: volume over the area of the face.
        a, b, c = box[0], box[1], box[2]
        areas = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)]).square().sum(1).sqrt()
        heights = box[0, 0] * box[1, 1] * box[2, 2] / areas
        n_cells = torch.nan_to_num(torch.floor(heights / (cutoff * (1.0 + 1e-6))), 1.0).clamp(1.0, most).to(torch.int64)
        # Fractional coordinates by forward substitution: the box is lower triangular.
        fz = positions[:, 2] / box[2, 2]
        fy = (positions[:, 1] - fz * box[2, 1]) / box[1, 1]
        fx = (positions[:, 0] - fz * box[2, 0] - fy * box[1, 0]) / box[0, 0]
        fractional = torch.stack([fx, fy, fz], dim=1)
        place = torch.nan_to_num((fractional - torch.floor(fractional)) * n_cells, 0.0, 0.0, 0.0).to(torch.int64).clamp_min(0)
        place = torch.minimum(place, n_cells - 1)
    else:
        low = positions.amin(0)
        extent = positions.amax(0) - low
        width = cutoff * (1.0 + 1e-6) + 1e-6 * extent
        n_cells = torch.nan_to_num(torch.floor(extent / width) + 1.0, 1.0).clamp(1.0, most).to(torch.int64)
        place = torch.remainder(torch.nan_to_num((positions - low) / width, 0.0, 0.0, 0.0).to(torch.int64), n_cells)
    shape: list[int] = n_cells.tolist()
    ny, nz = shape[1], shape[2]
    total = shape[0] * ny * nz
    cell = (place[:, 0] * ny + place[:, 1]) * nz + place[:, 2]
    counts = torch.zeros(total, dtype=torch.int64, device=device).index_add(0, cell, torch.ones_like(cell))
    capacity = int(counts.max())
    order = torch.argsort(cell, stable=True)
    rank = torch.arange(n_atoms, device=device) - (torch.cumsum(counts, 0) - counts).index_select(0, cell.index_select(0, order))
    # Row of a cell: the atoms in it, then n_atoms, an atom that does not exist.
    members = torch.full([total * capacity], n_atoms, dtype=torch.int64, device=device)
    members = members.index_copy(0, cell.index_select(0, order) * capacity + rank, order).view(total, capacity)
    steps: list[Tensor] = []
    for n in shape:
        # Of two cells the one before is the one after, and a single one is its own neighbour.
        steps.append(torch.arange(-1 if n >= 3 else 0, min(n, 2), device=device))
    around = torch.stack(torch.meshgrid(steps, indexing="ij"), dim=-1).view(-1, 3)
    # Far away, so that a slot without an atom is never close; NaN is not close to anything.
    padded = torch.cat([positions.t(), torch.full([3, 1], float("nan"), dtype=positions.dtype, device=device)], dim=1)
    receivers: list[Tensor] = []
    senders: list[Tensor] = []
    rows_at_once = max(1, _pairs_at_once(positions) // (around.shape[0] * capacity))
    for start in range(0, n_atoms, rows_at_once):
        rows = torch.arange(start, min(start + rows_at_once, n_atoms), device=device)
        near = torch.remainder(place[rows].unsqueeze(1) + around, n_cells)
        near_cells = (near[:, :, 0] * ny + near[:, :, 1]) * nz + near[:, :, 2]
        candidates = members.index_select(0, near_cells.view(-1)).view(rows.shape[0], -1)
        d = padded.index_select(1, candidates.view(-1)).view(3, rows.shape[0], -1) - padded.narrow(1, start, rows.shape[0]).unsqueeze(2)
        pair = torch.nonzero(_is_close(d, box, cutoff) & (candidates != rows.unsqueeze(1)))
        receivers.append(pair[:, 0] + start)
        senders.append(candidates[pair[:, 0], pair[:, 1]])
    return _matrix(torch.cat(receivers), torch.cat(senders), n_atoms)
