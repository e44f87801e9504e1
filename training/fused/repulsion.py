"""The screened nuclear repulsion as a table: for each pair of elements, its energy and its slope side by side.

The nodes divide the range of each pair evenly: the end of the range, where a third derivative jumps, is a node, and so the spline
misses nothing there.
"""

import torch
from torch import Tensor, nn

from training.fused.spline import SplineBasis, SplineTable, spline_table
from training.network.repulsion import ScreenedRepulsion

N_INTERVALS = 512


class TabulatedRepulsion(nn.Module):
    """What `ScreenedRepulsion` gives, to the accuracy of the table.

    Parameters
    ----------
    repulsion : ScreenedRepulsion
        In float64.
    """

    inverse_range: Tensor

    def __init__(self, repulsion: ScreenedRepulsion) -> None:
        super().__init__()
        self.n_elements = repulsion.charge_product.shape[0]
        self.rows_per_pair = 3 * (N_INTERVALS + 1)
        self.spline = SplineBasis(1.0, N_INTERVALS)
        self.register_buffer("inverse_range", repulsion.inverse_range.detach().reshape(-1).clone())
        tables = []
        for pair, inverse_range in enumerate(self.inverse_range):
            first, second = (torch.tensor(s) for s in divmod(pair, self.n_elements))

            def scaled(x: Tensor, first: Tensor = first, second: Tensor = second, inverse_range: Tensor = inverse_range) -> Tensor:
                return torch.stack(repulsion.pair(first, second, x / inverse_range), dim=1)

            tables.append(spline_table(scaled, 1.0, N_INTERVALS))
        rows, residues = zip(*tables, strict=True)
        self.table = SplineTable(torch.cat(rows), torch.cat(residues))

    def evaluate(
        self, species: Tensor, neighbors: Tensor, distance: Tensor, direction: Tensor, mask: Tensor, with_slope: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Energy and force as from `forward`, and the derivative of the summed energies by each distance.

        Parameters
        ----------
        species, neighbors, distance, direction, mask : Tensor
            As in `ScreenedRepulsion.forward`.
        with_slope : bool
            Whether the derivative is wanted.

        Returns
        -------
        tuple of Tensor
            ``(n,)``, ``(n, 3)``, and ``(n, k)``: the derivative of the tabulated energy itself, not the tabulated slope, of which the
            force is made and which differs from it by the error of the table; zeros if it is not wanted.
        """
        n, k = neighbors.shape[0], neighbors.shape[1]
        pair = ((species * self.n_elements).unsqueeze(1) + species.index_select(0, neighbors.view(-1)).view(n, k)).view(-1)
        inverse_range = self.inverse_range.index_select(0, pair)
        rows, weights, starts = self.spline((distance.view(-1) * inverse_range).clamp_max(1.0), with_slope)
        values = self.table((rows + (pair * self.rows_per_pair).view(-1, 1, 1), weights, starts)).view(n, k, -1) * mask.unsqueeze(2)
        energy = 0.5 * values.select(2, 0).sum(1)
        force = torch.bmm(values.narrow(2, 1, 1).transpose(1, 2), direction).squeeze(1)
        if not with_slope:
            return energy, force, torch.zeros_like(distance)
        return energy, force, values.select(2, 2) * inverse_range.view(n, k) * (0.5 * self.spline.per_length)

    def forward(self, species: Tensor, neighbors: Tensor, distance: Tensor, direction: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Arguments and results as in `ScreenedRepulsion.forward`."""
        energy, force, _ = self.evaluate(species, neighbors, distance, direction, mask, False)
        return energy, force
