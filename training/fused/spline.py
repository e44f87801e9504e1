"""Radial functions as cubic splines: smooth tables that cost one weighted gather per edge.

On nodes r_m = m h with values y_m and slopes d_m / h, a function is, with r = (m + t) h and 0 <= t < 1,

    s(r) = y_m + (3 t^2 - 2 t^3) (y_{m+1} - y_m) + (t - 2 t^2 + t^3) d_m + (t^3 - t^2) d_{m+1}.

The slopes are those that make the second derivative continuous. The differences of values are stored, not formed: the derivative
of s has no y in it, so float32 keeps its full precision there, which the differences of B-spline coefficients would lose. The
gradient is that of the table itself: the forces of a tabulated energy are exact.

A table is float32 in an exported file. Rounded apart, y_m plus its difference is not y_{m+1}, and s jumps from one interval to the next by
1e-8 of its size. Float32 arithmetic does not see that, but finite differences in float64 do, divided by their step. So a table comes with
residues: what each rounded y_m lacks of the value that the rounded differences lead to. In float64 they are added, and s jumps by no more than
1e-12 of the largest function there. They are 16-bit multiples of a unit for each node, which takes half the room of another row of float32.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import solve_banded
from torch import Tensor, nn

#: Singular values below this part of the largest are rounding: those of a released model drop from 2e-6 to 5e-9.
NO_RANK = 1e-8
#: Distances up to which a GPU gathers the whole table: launching a product costs more than its columns.
FEW = 4096


def spline_table(function: Callable[[Tensor], Tensor], end: float, n_intervals: int) -> tuple[Tensor, Tensor]:
    """Table of the spline with the values of `function` at all nodes and its slope at the first and the last.

    Parameters
    ----------
    function : callable
        Maps ``(n,)`` float64 to ``(n, n_functions)``.
    end : float
        The nodes divide the interval from 0 to `end` evenly.
    n_intervals : int
        How many intervals.

    Returns
    -------
    tuple of Tensor
        ``(3 * (n_intervals + 1), n_functions)``: y, the difference to the next y, and d, of every node; and ``(n_intervals + 1,
        n_functions)``, the residue of each y. All float64; the rows are numbers of float32.
    """
    h = end / n_intervals
    nodes = torch.linspace(0.0, end, n_intervals + 1, dtype=torch.float64)
    values, derivatives = torch.func.jvp(function, (nodes,), (torch.ones_like(nodes),))  # type: ignore[misc]  # three only with has_aux
    y, d = values.detach().numpy(), h * derivatives.detach().numpy()
    # The second derivative is continuous where d_{m-1} + 4 d_m + d_{m+1} = 3 (y_{m+1} - y_{m-1}); both ends are given.
    bands = np.ones((3, n_intervals + 1))
    bands[1] = 4.0
    bands[1, [0, -1]], bands[0, 1], bands[2, -2] = 1.0, 0.0, 0.0
    right = d.copy()
    right[1:-1] = 3.0 * (y[2:] - y[:-2])
    slopes = solve_banded((1, 1), bands, right)
    steps = np.diff(y, axis=0, append=y[-1:])
    rows = np.stack([y, steps, slopes], axis=1).astype(np.float32).astype(np.float64)
    # Added up from the far end, so that what is exactly zero there, as the repulsion is, stays so.
    continuous = np.concatenate([y[-1:] - np.cumsum(rows[-2::-1, 1], axis=0)[::-1], y[-1:]])
    return torch.from_numpy(rows.reshape(-1, y.shape[1])), torch.from_numpy(continuous - rows[:, 0])


class SplineBasis(nn.Module):
    """The four rows of a table that each distance needs, and their weights.

    Parameters
    ----------
    end : float
        Distance at the last node.
    n_intervals : int
        Intervals of the tables.
    """

    polynomials: Tensor
    offsets: Tensor

    def __init__(self, end: float, n_intervals: int) -> None:
        super().__init__()
        self.per_length = n_intervals / end
        self.last = n_intervals - 1
        # Rows: powers 0 .. 3 of t; columns: the weights of y_m, y_{m+1} - y_m, d_m, d_{m+1}, then their derivatives by t. Whole
        # numbers, exact in every precision.
        weights = [[1, 0, 0, 0], [0, 0, 1, 0], [0, 3, -2, -1], [0, -2, 1, 1]]
        slopes = [[0, 0, 1, 0], [0, 6, -4, -2], [0, -6, 3, 3], [0, 0, 0, 0]]
        powers = torch.tensor([w + d for w, d in zip(weights, slopes, strict=True)], dtype=torch.get_default_dtype())
        self.register_buffer("polynomials", powers)
        self.register_buffer("offsets", torch.tensor([0, 1, 2, 5]))

    def forward(self, distance: Tensor, with_slope: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """What `SplineTable` needs to know of each distance.

        Parameters
        ----------
        distance : Tensor
            ``(n,)``, any precision.
        with_slope : bool
            Whether the derivatives of the functions are wanted too.

        Returns
        -------
        tuple of Tensor
            Rows and weights ``(n, m, 4)``, int64 and in the precision of the buffers, where m is 1 for the values, or 2 for the values
            and, after them, their derivatives by the distance in units of the interval (`per_length` times that by the distance); and
            ``(n * m,)`` int64, where each distance's four begin.
        """
        x = distance * self.per_length
        interval = x.detach().floor().clamp_max(float(self.last))
        t = (x - interval).to(self.polynomials.dtype)
        square = t * t
        powers = torch.stack([torch.ones_like(t), t, square, square * t], dim=1)
        # The size, and not -1 in its place: torch 2.12 spoils that list of sizes when the module is frozen.
        kinds, n = 2 if with_slope else 1, distance.shape[0]
        weights = torch.mm(powers, self.polynomials.narrow(1, 0, 4 * kinds)).view(n, kinds, 4)
        rows = (interval.to(torch.int64) * 3).view(n, 1, 1) + self.offsets
        return rows.expand(n, kinds, 4), weights, torch.arange(0, 4 * kinds * n, 4, device=distance.device)


def values_alone(spline: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What `SplineBasis` gives without slopes, from what it gives with or without."""
    rows, weights, starts = spline
    return rows.narrow(1, 0, 1), weights.narrow(1, 0, 1), starts.narrow(0, 0, rows.shape[0])


class SplineTable(nn.Module):
    """Many functions of the distance in one table.

    Parameters
    ----------
    rows, residues : Tensor
        Of `spline_table`, or of several of the same length, one after the other.

    Notes
    -----
    A GPU gathers few columns faster than many. All functions of a radial network are combinations of its hidden units, so their table is the product
    of two factors of that rank, and there, in float32, the rows of the first are gathered and multiplied by the second.
    """

    table: Tensor
    residues: Tensor
    unit: Tensor
    columns: Tensor
    combinations: Tensor

    def __init__(self, rows: Tensor, residues: Tensor) -> None:
        super().__init__()
        self.register_buffer("columns", torch.empty(0))
        self.register_buffer("combinations", torch.empty(0))
        left, scales, right = torch.linalg.svd(rows, full_matrices=False)
        rank = -(-int((scales > NO_RANK * scales[0]).sum()) // 8) * 8
        self.has_factors = 4 * rank <= rows.shape[1]  # else the second step costs what the first saves
        self.few = FEW
        if self.has_factors:
            self.columns, self.combinations = (left[:, :rank] * scales[:rank]).contiguous(), right[:rank].contiguous()
        self.register_buffer("table", rows.contiguous())
        # Powers of two, exact in every precision; integers stay what they are when the module changes its own.
        largest = residues.abs().amax(1, keepdim=True).clamp_min(1e-30)
        unit = torch.exp2(torch.ceil(torch.log2(largest / 32767)))  # (nodes, 1)
        self.register_buffer("unit", unit)
        self.register_buffer("residues", torch.round(residues / unit).to(torch.int16))

    def forward(self, spline: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Rows and weights ``(n, m, 4)`` and starts of `SplineBasis` to values, or values and derivatives, ``(n, m, n_functions)``."""
        rows, weights, starts = spline
        if self.has_factors and weights.is_cuda and weights.dtype == torch.float32 and weights.shape[0] > self.few:
            return self.by_factors(spline)
        values, _, _, _ = torch.embedding_bag(self.table, rows.reshape(-1), starts, False, 0, False, weights.reshape(-1))
        values = values.view(weights.shape[0], weights.shape[1], -1)
        if values.dtype == torch.float64:
            node = torch.div(rows.select(1, 0).select(1, 0), 3, rounding_mode="floor")
            values.select(1, 0).add_(self.residues.index_select(0, node) * self.unit.index_select(0, node))
        return values

    def by_factors(self, spline: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """As `forward`, from the factors, without the residues."""
        rows, weights, starts = spline
        gathered, _, _, _ = torch.embedding_bag(self.columns, rows.reshape(-1), starts, False, 0, False, weights.reshape(-1))
        return torch.mm(gathered, self.combinations).view(weights.shape[0], weights.shape[1], -1)
