"""Several networks as one model: their mean, and how much they disagree (Smith et al., J. Chem. Phys. 148, 241733 (2018))."""

import torch
from torch import Tensor, nn

from training.exported import ExportedModel
from training.inference import inference_form
from training.network import AnyNetwork
from training.network.rigid import remove_net_force_and_torque


def force_deviations(forces: Tensor) -> Tensor:
    """Standard deviation, over the members of a committee, of the force on each atom: sqrt(<|F_i - <F_i>|^2>).

    Parameters
    ----------
    forces : Tensor
        ``(n_members, n_atoms, 3)``.

    Returns
    -------
    Tensor
        ``(n_atoms,)``, in the unit of the forces.
    """
    return (forces - forces.mean(0)).square().sum(-1).mean(0).sqrt()


class CommitteeNetwork(nn.Module):
    """Networks that are given the same neighbours.

    Parameters
    ----------
    networks : sequence of SE3Transformer or ReferenceTransformer
        Trained networks of the same elements and the same cutoff; their sizes may differ.
    """

    def __init__(self, networks: list[AnyNetwork]) -> None:
        super().__init__()
        self.cutoff = networks[0].cutoff
        self.members = nn.ModuleList([inference_form(n) for n in networks])

    def forward(self, species: Tensor, displacement: Tensor, neighbors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mean energies of the atoms ``(n_atoms,)``, and each member's direct forces ``(n_members, n_atoms, 3)``; arguments as theirs."""
        energies: list[Tensor] = []
        forces: list[Tensor] = []
        for member in self.members:
            energy, force = member(species, displacement, neighbors, mask)
            energies.append(energy)
            forces.append(force)
        return torch.stack(energies).mean(0), torch.stack(forces)

    @torch.jit.export
    def energy_and_gradient(self, species: Tensor, displacement: Tensor, neighbors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The results of `forward`, and the mean gradient; otherwise as `FusedTransformer.energy_and_gradient`."""
        energies: list[Tensor] = []
        forces: list[Tensor] = []
        gradients: list[Tensor] = []
        for member in self.members:
            energy, force, gradient = member.energy_and_gradient(species, displacement, neighbors, mask)  # type: ignore[operator]
            energies.append(energy)
            forces.append(force)
            gradients.append(gradient)
        return torch.stack(energies).mean(0), torch.stack(forces), torch.stack(gradients).mean(0)


class ExportedCommittee(ExportedModel):
    """Format 1 of the contract for the mean of several networks, and the deviation of their forces.

    Parameters
    ----------
    networks : sequence of SE3Transformer or ReferenceTransformer
        As in `CommitteeNetwork`, in evaluation mode.
    atomic_numbers, trained
        As in `ExportedModel`.
    """

    def __init__(self, networks: list[AnyNetwork], atomic_numbers: tuple[int, ...], trained: tuple[int, ...] | None = None) -> None:
        super().__init__(CommitteeNetwork(networks), atomic_numbers, trained)

    def _direct(self, forces: Tensor, factor: Tensor, positions: Tensor, box_vectors: Tensor | None) -> Tensor:
        """Mean forces of the contract from those of all members."""
        scaled = forces.mean(0).to(positions.dtype) * (factor * self.angstrom_per_nm).to(positions.dtype)
        return remove_net_force_and_torque(scaled, positions, box_vectors is None)

    @torch.jit.export
    def deviations(self, positions: Tensor, atomic_numbers: Tensor, box_vectors: Tensor | None = None) -> Tensor:
        """Standard deviation of the members' direct forces on each atom; no gradient is recorded.

        Parameters
        ----------
        positions, atomic_numbers, box_vectors
            As in `forward`.

        Returns
        -------
        Tensor
            ``(n_atoms,)`` kJ/mol/nm, sqrt(<|F_i - <F_i>|^2>) over the members, each without net force and, without a box, net torque;
            dtype and device of `positions`.
        """
        home = self.species_of_number.device
        with torch.no_grad():
            x = positions.detach().to(home)
            species, displacement, neighbors, mask, factor = self._prepare(x, atomic_numbers.to(home), box_vectors)
            _, forces = self.network(species, displacement, neighbors, mask)
            forces = forces.to(x.dtype) * (factor * self.angstrom_per_nm).to(x.dtype)
            members: list[Tensor] = []
            for k in range(forces.shape[0]):
                members.append(remove_net_force_and_torque(forces[k], x, box_vectors is None))
            return force_deviations(torch.stack(members)).to(positions.device)
