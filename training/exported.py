"""The module that is exported: neighbours, units and the network behind the contract of `torchscript_models/README.md`."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from training.inference import inference_form
from training.neighbors import all_pairs_up_to, find_neighbors, fixed_width_up_to
from training.network import AnyNetwork
from training.network.rigid import remove_net_force_and_torque
from training.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV

if TYPE_CHECKING:
    from training.committee import CommitteeNetwork


class ExportedModel(nn.Module):
    """Format 1 of the contract: positions in nm in, energy in kJ/mol and forces in kJ/mol/nm out.

    Parameters
    ----------
    network : SE3Transformer, ReferenceTransformer or CommitteeNetwork
        Trained, in evaluation mode.
    atomic_numbers : sequence of int
        Elements in the order of the species index.
    trained : sequence of int, optional
        Those of them that it was trained on, all by default; others give NaN.
    """

    species_of_number: Tensor
    poison_of_number: Tensor

    def __init__(self, network: "AnyNetwork | CommitteeNetwork", atomic_numbers: tuple[int, ...], trained: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.network = inference_form(network)
        self.cutoff_nm = network.cutoff / ANGSTROM_PER_NM
        self.angstrom_per_nm = ANGSTROM_PER_NM
        self.kj_per_mol_per_ev = KJ_PER_MOL_PER_EV
        # Whoever wants shapes that do not depend on the positions sets the first, and reads from the others how few or many atoms need none.
        self.max_neighbors = 0
        self.all_pairs_up_to, self.fixed_width_up_to = all_pairs_up_to(True), fixed_width_up_to()
        species = torch.zeros(256, dtype=torch.int64)
        species[list(atomic_numbers)] = torch.arange(len(atomic_numbers))
        self.register_buffer("species_of_number", species)
        poison = torch.full((256,), torch.nan, dtype=torch.get_default_dtype())
        poison[list(atomic_numbers if trained is None else trained)] = 0.0
        self.register_buffer("poison_of_number", poison)

    def _prepare(self, positions: Tensor, atomic_numbers: Tensor, box_vectors: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Species, displacements (Angstrom), neighbours and mask for the network; and the float64 factor () from eV to kJ/mol."""
        if positions.dim() != 2 or positions.shape[1] != 3 or positions.shape[0] != atomic_numbers.shape[0] or positions.shape[0] == 0:
            raise ValueError("positions must be (n_atoms, 3) and atomic_numbers (n_atoms,), of at least one atom")
        number = atomic_numbers.clamp(0, self.species_of_number.shape[0] - 1)  # no element has the first or the last
        species = self.species_of_number.index_select(0, number)
        x = positions.detach()
        box = box_vectors
        if box is not None:
            box = box.to(positions)
            # On a GPU a comparison here would stall the device at every step; there the small box becomes NaN below.
            if not box.is_cuda and float(torch.diagonal(box).amin()) < 2 * self.cutoff_nm:
                raise ValueError("the periodic box is too small: each diagonal element must be at least twice the cutoff of the model")
        neighbors, displacement, mask, excess = find_neighbors(positions, box, self.cutoff_nm, self.max_neighbors)
        # The network takes distances in the precision of the positions, but not below its own.
        if self.poison_of_number.dtype == torch.float64:
            displacement = displacement.to(torch.float64)
        # An element that the model does not know, a coordinate that is not finite (it has no neighbours and would look like an isolated
        # atom), a box that is not, on a GPU also one that is too small: none may ever give a plausible number. Zero times what is not
        # finite is NaN.
        factor = torch.add(self.poison_of_number.index_select(0, number).sum(), x.sum(), alpha=0.0) + self.kj_per_mol_per_ev
        if excess is not None:
            factor = factor + excess
        if box is not None:
            factor = torch.add(factor, box.detach().sum(), alpha=0.0)
            factor = torch.where(torch.diagonal(box).amin() >= 2 * self.cutoff_nm, factor, float("nan"))
        return species, displacement * self.angstrom_per_nm, neighbors, mask, factor.to(torch.float64)

    def _direct(self, forces: Tensor, factor: Tensor, positions: Tensor, box_vectors: Tensor | None) -> Tensor:
        """Forces of the network, eV/Angstrom, to those of the contract."""
        scaled = forces.to(positions.dtype) * (factor * self.angstrom_per_nm).to(positions.dtype)
        return remove_net_force_and_torque(scaled, positions, box_vectors is None)

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
            Energy () float64 kJ/mol relative to self-energies, and forces ``(n_atoms, 3)`` kJ/mol/nm, contiguous, dtype and
            device of `positions`, with no net force and, without a box, no net torque.
        """
        device = positions.device
        home = self.species_of_number.device
        with torch.no_grad():
            # OpenMM's CPU kernels ask for gradients of the positions always; without detach the interpreter would prepare for them.
            x = positions.detach().to(home)
            species, displacement, neighbors, mask, factor = self._prepare(x, atomic_numbers.to(home), box_vectors)
            energies, forces = self.network(species, displacement, neighbors, mask)
            energy = energies.to(torch.float64).sum() * factor
            direct = self._direct(forces, factor, x, box_vectors)
        return energy.to(device), direct.to(device).contiguous()

    @torch.jit.export
    def conservative_and_direct(self, positions: Tensor, atomic_numbers: Tensor, box_vectors: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Energy, conservative and direct forces from one evaluation; no gradient is recorded, so none is kept.

        Parameters
        ----------
        positions, atomic_numbers, box_vectors
            As in `forward`.

        Returns
        -------
        tuple of Tensor
            Energy as from `forward`; minus its gradient, ``(n_atoms, 3)`` kJ/mol/nm, dtype and device of `positions`, contiguous; and the
            forces of `forward`. The gradient comes from the reverse pass of the fused network, or, of a network that has none, from autograd.
        """
        device = positions.device
        home = self.species_of_number.device
        x = positions.detach().to(home)
        with torch.no_grad():
            species, displacement, neighbors, mask, factor = self._prepare(x, atomic_numbers.to(home), box_vectors)
        energies, forces, gradient = self.network.energy_and_gradient(species, displacement, neighbors, mask)  # type: ignore[operator]
        with torch.no_grad():
            energy = energies.to(torch.float64).sum() * factor
            direct = self._direct(forces, factor, x, box_vectors)
            # d = x_j - x_i + const
            pull = gradient.to(x.dtype) * (factor * self.angstrom_per_nm).to(x.dtype)
            conservative = pull.sum(1).index_add(0, neighbors.view(-1), pull.view(-1, 3), alpha=-1.0)
        return energy.to(device), conservative.to(device).contiguous(), direct.to(device).contiguous()

    @torch.jit.export
    def energy(self, positions: Tensor, atomic_numbers: Tensor, box_vectors: Tensor | None = None) -> Tensor:
        """Energy alone, differentiable by autograd in `positions` and `box_vectors`; arguments as in `forward`.

        For derivatives that `conservative_and_direct` does not give, such as that by a strain: it records the whole evaluation, and costs
        the time and memory of that. Of the fused form autograd gives first derivatives only.
        """
        home = self.species_of_number.device
        species, displacement, neighbors, mask, factor = self._prepare(positions.to(home), atomic_numbers.to(home), box_vectors)
        energies, _ = self.network(species, displacement, neighbors, mask)
        return (energies.to(torch.float64).sum() * factor).to(positions.device)

    @torch.jit.export
    def energy_and_forces(self, positions: Tensor, atomic_numbers: Tensor, box_vectors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Results of `forward` from one evaluation, the energy differentiable as from `energy`, the forces constants."""
        home = self.species_of_number.device
        x = positions.to(home)
        species, displacement, neighbors, mask, factor = self._prepare(x, atomic_numbers.to(home), box_vectors)
        energies, forces = self.network(species, displacement, neighbors, mask)
        energy = energies.to(torch.float64).sum() * factor
        with torch.no_grad():
            direct = self._direct(forces, factor, x, box_vectors)
        return energy.to(positions.device), direct.to(positions.device).contiguous()


class ExportedModelWithFast(ExportedModel):
    """`ExportedModel` with a second, cheaper network, whose conservative forces drive the inner steps of multiple time stepping.

    The fast forces are minus the gradient of an energy, so each of the two pieces that r-RESPA composes is a Hamiltonian flow, and their
    product conserves an energy near that of the first network, which direct forces at the inner steps do not. How near the fast
    forces are to those of the first network bounds the outer step; the sum of both pieces is the first network's whatever they are.

    Parameters
    ----------
    network : SE3Transformer or ReferenceTransformer
        As in `ExportedModel`.
    fast : SE3Transformer or ReferenceTransformer
        For the same elements; its cutoff may be shorter.
    atomic_numbers, trained
        As in `ExportedModel`, of both.

    References
    ----------
    M. Tuckerman, B. J. Berne, G. J. Martyna, J. Chem. Phys. 97, 1990 (1992).
    """

    def __init__(self, network: AnyNetwork, fast: AnyNetwork, atomic_numbers: tuple[int, ...], trained: tuple[int, ...] | None = None) -> None:
        super().__init__(network, atomic_numbers, trained)
        self.fast_model = ExportedModel(fast, atomic_numbers, trained)

    @torch.jit.export
    def fast(self, positions: Tensor, atomic_numbers: Tensor, box_vectors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Energy () float64 kJ/mol and conservative forces ``(n_atoms, 3)`` kJ/mol/nm of the fast network; arguments as in `forward`."""
        energy, forces, _ = self.fast_model.conservative_and_direct(positions, atomic_numbers, box_vectors)
        return energy, forces
