"""From displacements to what every layer of the network needs: distance, direction, and degree-2 couplings."""

import torch
from torch import Tensor

#: Basis of the symmetric traceless 3x3 matrices, ``(5, 3, 3)``, in e3nn's order of components: Y_2m(u) is proportional to
#: u^T B_m u. The entries are whole numbers, exact in any precision; B_m is divided by its Frobenius norm when it is used,
#: because a constant rounded to float32 would break equivariance in float64.
DEGREE_TWO_BASIS: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((0, 0, 1), (0, 0, 0), (1, 0, 0)),
    ((0, 1, 0), (1, 0, 0), (0, 0, 0)),
    ((-1, 0, 0), (0, 2, 0), (0, 0, -1)),
    ((0, 0, 0), (0, 0, 1), (0, 1, 0)),
    ((-1, 0, 0), (0, 0, 0), (0, 0, 1)),
)


def safe_norm(vectors: Tensor) -> Tensor:
    """Length over the last axis with a gradient that is finite (zero) at the zero vector.

    The derivative of ``sqrt(x.x)`` is 0/0 at zero, and masking the result afterwards leaves NaN in the backward pass;
    the argument of the square root is therefore replaced first.

    Parameters
    ----------
    vectors : Tensor
        ``(..., 3)``.

    Returns
    -------
    Tensor
        ``(...)``, exactly 0 for a zero vector.
    """
    squared = (vectors * vectors).sum(-1)
    is_zero = squared == 0
    return torch.where(is_zero, torch.zeros_like(squared), torch.sqrt(torch.where(is_zero, torch.ones_like(squared), squared)))


def distances_and_directions(displacement: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Distance and unit direction of every neighbour slot, finite with finite gradients on padding and between coincident atoms.

    Parameters
    ----------
    displacement : Tensor
        ``(n_atoms, max_neighbors, 3)`` x_j - x_i, Angstrom.
    mask : Tensor
        ``(n_atoms, max_neighbors)`` bool, False for padding.

    Returns
    -------
    tuple of Tensor
        ``(n_atoms, max_neighbors)`` and ``(n_atoms, max_neighbors, 3)``.
    """
    # Padding gets a constant unit displacement before any non-linear operation touches it.
    harmless = torch.zeros_like(displacement)
    harmless[..., 0] = 1.0
    displacement = torch.where(mask.unsqueeze(-1), displacement, harmless)
    distance = safe_norm(displacement)
    return distance, displacement / distance.clamp_min(1e-6).unsqueeze(-1)


class EdgeGeometry(torch.nn.Module):
    """Distance, unit direction and the degree-2 coupling matrix of every edge; computed once per forward pass.

    The coupling matrix ``G[m, a] = sum_b B_m[a, b] u_b`` serves both ways: ``G w`` is the symmetric traceless part of
    u (x) w in degree-2 components, ``G^T t`` is the vector (matrix t) u. All harmonics up to degree 4 that the kernels of
    equation 2.1 need arise from repeated products with u, so no angle is ever computed and every derivative is finite.
    """

    basis: Tensor
    squared_norms: Tensor

    def __init__(self) -> None:
        super().__init__()
        basis = torch.tensor(DEGREE_TWO_BASIS, dtype=torch.get_default_dtype())
        # (3, 15): u -> G with the components (m, a) flattened, and (15,) the squared norm of each row's matrix.
        self.register_buffer("basis", basis.permute(2, 0, 1).reshape(3, 15).contiguous())
        self.register_buffer("squared_norms", basis.square().sum([1, 2]).repeat_interleave(3))

    def forward(self, displacement: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the geometry of every neighbour slot.

        Parameters
        ----------
        displacement : Tensor
            ``(n_atoms, max_neighbors, 3)`` x_j - x_i, Angstrom.
        mask : Tensor
            ``(n_atoms, max_neighbors)`` bool, False for padding.

        Returns
        -------
        tuple of Tensor
            Distances ``(n_atoms, max_neighbors)``, directions ``(..., 3)`` and coupling matrices ``(..., 5, 3)``, in the dtype of
            `displacement`.
        """
        distance, direction = distances_and_directions(displacement, mask)
        coupling = torch.matmul(direction, self.basis.to(direction.dtype)) * torch.rsqrt(self.squared_norms.to(direction.dtype))
        return distance, direction, coupling.view(direction.shape[0], direction.shape[1], 5, 3)
