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
    if not remove_torque:
        f = forces.to(torch.float64)
        return (f - f.mean(0, keepdim=True)).to(forces.dtype)
    # Both about their means in one go: each kernel counts on a GPU.
    both = torch.cat([forces, positions], dim=1).to(torch.float64)
    both = both - both.mean(0, keepdim=True)
    f, r = both.narrow(1, 0, 3), both.narrow(1, 3, 3)
    # With [v]_ab = epsilon_abc v_c, the torque is [t] = sum_i (r f^T - f r^T), and A [t] A = det(A) [A^-1 t] for symmetric A
    # solves for omega without a linear-algebra routine, none of which can be captured in a CUDA graph.
    outer = torch.matmul(r.transpose(0, 1), both)
    moment, gyration = outer.narrow(1, 0, 3), outer.narrow(1, 3, 3)
    torque = moment - moment.transpose(0, 1)
    # 1e-12 Angstrom^2: keeps a single atom, whose matrix and torque are zero, from dividing 0 by 0.
    inertia = torch.diag((torch.trace(gyration) * (1.0 + 1e-10) + 1e-12).expand(3)) - gyration
    determinant = torch.dot(inertia[0], torch.linalg.cross(inertia[1], inertia[2]))
    omega = torch.matmul(torch.matmul(inertia, torque), inertia) / determinant
    return torch.addmm(f, r, omega, alpha=-1.0).to(forces.dtype)  # omega x r = r [omega]
