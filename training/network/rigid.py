"""Remove what no set of internal forces can have: a net force, and a net torque."""

import torch
from torch import Tensor


def remove_net_force_and_torque(forces: Tensor, positions: Tensor, remove_torque: bool) -> Tensor:
    """Smallest change of the forces on one isolated molecule that takes away their sum and their torque.

    The correction is that of a rigid body, a common force plus omega x r about the centre of the positions, with
    sum_i (r_i^2 1 - r_i r_i^T) omega = torque. A linear molecule makes the matrix singular along its axis, about which there is
    no torque either; a relative regularisation of 1e-10 keeps the closed-form inverse finite there.

    Parameters
    ----------
    forces, positions : Tensor
        ``(n_atoms, 3)`` in any consistent units; computed in float64.
    remove_torque : bool
        False in a periodic box, where a torque has no meaning.

    Returns
    -------
    Tensor
        ``(n_atoms, 3)``, dtype of `forces`.
    """
    f = forces.to(torch.float64)
    f = f - f.mean(0, keepdim=True)
    if remove_torque:
        r = positions.to(torch.float64)
        r = r - r.mean(0, keepdim=True)
        torque = torch.linalg.cross(r, f).sum(0)
        square = (r * r).sum()
        eye = torch.eye(3, dtype=torch.float64, device=r.device)
        # 1e-12 Angstrom^2: keeps a single atom, whose matrix and torque are zero, from dividing 0 by 0.
        inertia = square * (1.0 + 1e-10) * eye - torch.matmul(r.transpose(0, 1), r) + 1e-12 * eye
        # Inverse by cofactors: the cross products of the rows. torch.linalg cannot be captured in a CUDA graph.
        a, b, c = inertia[0], inertia[1], inertia[2]
        cofactors = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)])
        omega = torch.matmul(cofactors.transpose(0, 1), torque) / torch.dot(a, cofactors[0])
        f = f - torch.linalg.cross(omega.unsqueeze(0).expand_as(r), r)
    return f.to(forces.dtype)
