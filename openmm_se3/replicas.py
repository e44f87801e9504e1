"""Several molecules in one force that do not see each other: copies of a small one cost little more than one of it."""

from collections.abc import Sequence
from typing import Any, Optional  # TorchScript reads Optional, not "| None", in the signature of a scripted method.

import numpy as np
import torch
from openmm import app, unit
from torch import Tensor, nn

from openmm_se3.checks import in_nanometers
from openmm_se3.errors import UnsupportedSystemError


def replicate(topology: app.Topology, positions: Any, copies: int) -> tuple[app.Topology, np.ndarray, list[int]]:
    """Copies of a molecule, side by side, for ``createSystem(topology, batch=batch)``.

    Parameters
    ----------
    topology : openmm.app.Topology
        Without a periodic box.
    positions : ndarray, sequence of openmm.Vec3, or openmm.unit.Quantity of either
        ``(n_atoms, 3)``; nm if they have no unit.
    copies : int
        How many, at least 1.

    Returns
    -------
    tuple
        Topology of all, positions ``(copies * n_atoms, 3)`` nm, 1 nm between neighbouring copies so that pictures show them apart, and
        for each atom the index of its copy.

    Raises
    ------
    ValueError
        If `copies` is below 1, or `positions` are not as many as the atoms.
    UnsupportedSystemError
        If there is a periodic box.

    Examples
    --------
    >>> many, positions, batch = replicate(topology, positions, 8)  # doctest: +SKIP
    >>> system = SE3Potential("se3-ani1x").createSystem(many, batch=batch)  # doctest: +SKIP
    """
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")
    if topology.getPeriodicBoxVectors() is not None:
        raise UnsupportedSystemError("copies that do not see each other are molecules in vacuum, but the topology has a periodic box")
    positions = in_nanometers(positions, topology.getNumAtoms())
    modeller = app.Modeller(app.Topology(), [] * unit.nanometer)
    step = np.array([float(np.ptp(positions[:, 0])) + 1.0, 0.0, 0.0])
    for k in range(copies):
        modeller.add(topology, (positions + k * step) * unit.nanometer)
    batch = np.repeat(np.arange(copies), topology.getNumAtoms()).tolist()
    return modeller.topology, np.array(modeller.positions.value_in_unit(unit.nanometer)), batch


def check_batch(batch: Sequence[int], n_atoms: int, periodic: bool) -> list[int]:
    """Refuse a `batch` that cannot be meant.

    Parameters
    ----------
    batch : sequence of int
        Index of the molecule of each atom of the model.
    n_atoms : int
        Atoms of the model.
    periodic : bool
        Whether the System is periodic.

    Returns
    -------
    list of int
        The indices, counted from 0 without gaps.

    Raises
    ------
    ValueError
        If it has not one whole number for each atom.
    UnsupportedSystemError
        If the System is periodic.
    """
    given = np.asarray(batch)
    if given.shape != (n_atoms,) or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(
            f"batch must hold one whole number for each of the {n_atoms} atoms of the model, that of its molecule; got an array of {given.dtype} "
            f"with shape {given.shape}"
        )
    if periodic:
        raise UnsupportedSystemError("batch is for molecules in vacuum that do not see each other, but the System is periodic; make it without a box")
    return np.unique(given, return_inverse=True)[1].tolist()


class Apart(nn.Module):
    """A model whose atoms are in groups that do not see each other, all evaluated in one call.

    The groups are put on a lattice, farther from each other than the cutoff. Translations change nothing else: energies and their
    gradients are those of each group alone. The model takes net force and torque from its direct forces over all atoms; what it took
    is a rigid motion of each group as well, so taking them from each group gives what each alone would have.

    Parameters
    ----------
    model : ScriptModule
        What `load_model` returns.
    groups : sequence of int
        Group of each atom, from 0 without gaps.
    cutoff_nm : float
        Of the model.
    """

    group: Tensor
    counts: Tensor
    sites: Tensor

    def __init__(self, model: torch.jit.ScriptModule, groups: Sequence[int], cutoff_nm: float) -> None:
        super().__init__()
        self.model = model
        group = torch.tensor(list(groups))
        counts = torch.bincount(group)
        edge = int(np.ceil(len(counts) ** (1 / 3) - 1e-9))
        index = torch.arange(len(counts))
        self.register_buffer("group", group)
        self.register_buffer("counts", counts.unsqueeze(1))
        self.register_buffer("sites", torch.stack([index % edge, index // edge % edge, index // edge**2], dim=1))
        self.gap = 1.01 * cutoff_nm

    def _sum(self, values: Tensor) -> Tensor:
        """Sums over the atoms of each group, ``(n_groups, 3)``."""
        return torch.zeros([self.counts.shape[0], 3], dtype=values.dtype, device=values.device).index_add(0, self.group, values)

    def _centred(self, values: Tensor) -> Tensor:
        """Values ``(n_atoms, 3)`` less their mean over the group."""
        return values - (self._sum(values) / self.counts).index_select(0, self.group)

    def _place(self, positions: Tensor) -> Tensor:
        """Positions on the lattice, in double precision whatever they came in."""
        x = positions.to(torch.float64)
        with torch.no_grad():
            centred = self._centred(x)
            spacing = 2.0 * centred.square().sum(1).amax().sqrt() + self.gap
            shift = centred - x + (self.sites * spacing).index_select(0, self.group)
        return x + shift

    def _remove_net_force_and_torque(self, forces: Tensor, positions: Tensor) -> Tensor:
        """Of each group: less a common force and omega x r about its centre, with I omega = torque."""
        f, r = self._centred(forces.to(torch.float64)), self._centred(positions.to(torch.float64))
        torque = self._sum(torch.linalg.cross(r, f))
        square = self._sum(r * r).sum(1)
        # A linear molecule has no moment about its axis, and no torque; the small numbers keep 0 / 0 from arising there and for one atom.
        diagonal = (square * (1.0 + 1e-10) + 1e-14).unsqueeze(1)
        rows = [-self._sum(r * r[:, k : k + 1]) for k in range(3)]
        unit_vectors = torch.eye(3, dtype=torch.float64, device=f.device)
        a, b, c = rows[0] + diagonal * unit_vectors[0], rows[1] + diagonal * unit_vectors[1], rows[2] + diagonal * unit_vectors[2]
        # The inverse of a symmetric matrix with rows a, b, c has the columns b x c, c x a, a x b, over its determinant.
        bc, ca, ab = torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)
        omega = (bc * torque[:, 0:1] + ca * torque[:, 1:2] + ab * torque[:, 2:3]) / (a * bc).sum(1, keepdim=True)
        return f - torch.linalg.cross(omega.index_select(0, self.group), r)

    def forward(self, positions: Tensor, atomic_numbers: Tensor, box_vectors: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:  # noqa: UP045
        """As that of the model; the box is None."""
        with torch.no_grad():
            x = self._place(positions.to(self.group.device))
            energy, forces = self.model(x, atomic_numbers, box_vectors)
            return energy, self._remove_net_force_and_torque(forces, x).to(positions)

    @torch.jit.export
    def energy(self, positions: Tensor, atomic_numbers: Tensor, box_vectors: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        """As that of the model."""
        return self.model.energy(self._place(positions.to(self.group.device)), atomic_numbers, box_vectors)

    @torch.jit.export
    def energy_and_forces(self, positions: Tensor, atomic_numbers: Tensor, box_vectors: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:  # noqa: UP045
        """As that of the model."""
        x = self._place(positions.to(self.group.device))
        energy, forces = self.model.energy_and_forces(x, atomic_numbers, box_vectors)
        with torch.no_grad():
            forces = self._remove_net_force_and_torque(forces, x).to(positions)
        return energy, forces


class ApartWithReversePass(Apart):
    """`Apart`, of a model that has its conservative forces without autograd."""

    @torch.jit.export
    def conservative_and_direct(
        self,
        positions: Tensor,
        atomic_numbers: Tensor,
        box_vectors: Optional[Tensor] = None,  # noqa: UP045
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As that of the model."""
        x = self._place(positions.to(self.group.device))
        energy, forces, direct = self.model.conservative_and_direct(x, atomic_numbers, box_vectors)
        return energy, forces.to(positions), self._remove_net_force_and_torque(direct, x).to(positions)


class ApartWithFast(ApartWithReversePass):
    """The same, of a model that has a fast network too."""

    @torch.jit.export
    def fast(
        self,
        positions: Tensor,
        atomic_numbers: Tensor,
        box_vectors: Optional[Tensor] = None,  # noqa: UP045
    ) -> tuple[Tensor, Tensor]:
        """As that of the model."""
        energy, forces = self.model.fast(self._place(positions.to(self.group.device)), atomic_numbers, box_vectors)
        return energy, forces.to(positions)


def keep_apart(model: torch.jit.ScriptModule, groups: Sequence[int], cutoff_nm: float) -> Apart:
    """`Apart` of a model, with all that the model has.

    Parameters
    ----------
    model, groups, cutoff_nm
        As of `Apart`.

    Returns
    -------
    Apart
        In evaluation mode.
    """
    module: type[Apart] = Apart
    if hasattr(model, "fast"):
        module = ApartWithFast
    elif hasattr(model, "conservative_and_direct"):
        module = ApartWithReversePass
    return module(model, groups, cutoff_nm).eval()
