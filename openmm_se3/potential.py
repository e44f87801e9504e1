"""`SE3Potential`: the way in for users of OpenMM."""

import warnings
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import app, unit

from openmm_se3.allocator import keep_freed_memory
from openmm_se3.binding import FORCE_MODES, FORCES_OF_MODE, MULTIPLE_TIME_STEPS, modes_of
from openmm_se3.checks import check_box, in_nanometers
from openmm_se3.force import atoms_of_forces, create_forces, model_atoms, require_same_particles, warn_of_virtual_sites
from openmm_se3.integrators import may_be_inner_steps
from openmm_se3.masses import repartition_hydrogen_mass
from openmm_se3.model_file import ModelMetadata, load_model, module_from_bytes, module_to_bytes
from openmm_se3.replicas import check_batch

#: Name that openmm-ml gives to the parameter between force field and model.
INTERPOLATION_PARAMETER = "lambda_interpolate"

PRECISIONS = {"single": torch.float32, "double": torch.float64}


def _warn_of_another_box(box: unit.Quantity, system: openmm.System) -> None:
    """A new Context has the System's default box, whatever the topology says."""
    edges, default = in_nanometers(box, 3), in_nanometers(system.getDefaultPeriodicBoxVectors(), 3)
    if not np.allclose(edges, default, atol=1e-4):
        warnings.warn(
            f"the topology's periodic box has a diagonal of {np.diag(edges).round(4).tolist()} nm, the System's default box, with which a Context "
            f"starts, one of {np.diag(default).round(4).tolist()} nm; call system.setDefaultPeriodicBoxVectors(*topology.getPeriodicBoxVectors()), "
            "or set the box in the Context",
            stacklevel=4,
        )


def _warn_of_forces_without_box(system: openmm.System) -> None:
    nonbonded = (openmm.NonbondedForce, openmm.CustomNonbondedForce)
    if not system.usesPeriodicBoundaryConditions() and any(isinstance(force, nonbonded) for force in system.getForces()):
        warnings.warn(
            "the topology has a periodic box, which the model takes, but the System's own nonbonded forces are not periodic; make the System with "
            "a nonbondedMethod such as PME, or call topology.setPeriodicBoxVectors(None)",
            stacklevel=4,
        )


def _warn_of_atoms_counted_twice(atoms: Sequence[int], system: openmm.System) -> None:
    twice = sorted(atoms_of_forces(system) & set(atoms))
    if twice:
        warnings.warn(
            f"the System has a force of a model for atoms {twice[:5]} already, and this one is added to it; make a new System, unless that is meant",
            stacklevel=4,
        )


def _what_is_missing(metadata: ModelMetadata, forces: str) -> str:
    untrained = FORCES_OF_MODE[forces] & set(metadata.untrained)
    if untrained:
        return (
            f"model {metadata.name!r} was not trained for {' and '.join(sorted(untrained))} forces, which forces={forces!r} needs: the last stage of "
            f"its training had no weight for them. Use forces={'conservative' if untrained == {'direct'} else 'direct'!r}, or train it for both"
        )
    return (
        f"model {metadata.name!r} has no fast network, which forces={forces!r} needs: use forces='mts', or export the model with one "
        "('python -m training export MODEL NEW.pt --fast FAST')"
    )


class SE3Potential:
    """A trained SE(3)-Transformer as a potential for OpenMM.

    Parameters
    ----------
    model : str or Path
        Name of a released model (see `available_models`) or path of an exported file.
    forces : str
        ``"direct"``: the network's own force output, fastest, for thermostatted dynamics; it is not exactly the gradient of an
        energy, so energy drifts without a thermostat. ``"conservative"``: minus the gradient of the energy, for minimisation,
        constant-energy dynamics and free energies. ``"mts"``: two forces that sum to exactly the conservative model, for multiple
        time steps: group `forceGroup` has the direct forces, with zero energy, and the next group the energy and what the direct
        forces lack. ``"mts-fast"``: the same with energy and conservative forces of the model's fast network, if it has one, in place of the
        direct forces: cheaper, and further from the model, so take it with heavier hydrogens. Drive both with `MultipleTimeStepIntegrator`,
        or one of ``openmm.mtsintegrator`` with groups ``[(0, n), (1, 1)]``, which evaluates the first forces n + 1 times a step on a CPU;
        every other integrator sees the conservative model, at more cost.
        ``LocalEnergyMinimizer`` compares energies along its way, so give it any but ``"direct"``; with direct forces,
        which are no exact gradient, it may stop early (`openmm_se3.simulate.minimize` does not).
    device : str or None
        Device on which `SE3Calculator` evaluates. In OpenMM the Platform of the Context decides where the force runs, so there
        the value is only checked: asking for a GPU that torch cannot see is an error. Where openmm-torch is missing or does not
        fit, the model runs through ``openmm.PythonForce``, with a warning, on this device, by default a GPU where torch sees one.
    precision : str
        ``"single"`` or ``"double"``, arithmetic inside the network. Energies are summed in double precision either way.
    max_neighbors : int, optional
        Most neighbours within the cutoff that an atom will have, as `openmm_se3.cuda_graphs.width_for` finds it, for CUDA graphs of 129 to 2000
        atoms; other sizes have no use for it. An atom that has more makes energy and forces NaN. By default any number will do, without a graph.
    cuda_graphs : bool
        Whether to replay the evaluation on OpenMM's CUDA platform as a CUDA graph where that is possible: up to 128 atoms, up to 2000 with
        `max_neighbors`, and without a scale parameter. It is tried and compared first; where it fails, a warning says so, and why.
    inner_steps : int, optional
        With ``"mts"`` and ``"mts-fast"``: those of the ``MultipleTimeStepIntegrator(..., innerSteps, fastInSlow=True)`` that is to drive the forces.
        The second of the two then takes over 1/n of the first, and of its energy, which saves one of n evaluations in a step; their sum stays what
        it is. Not where other forces act at the inner steps, as with `createMixedSystem`. Other `forces` take no notice.

    Attributes
    ----------
    model : ScriptModule
        What `load_model` returned, in `precision`.
    metadata : ModelMetadata
        Elements, cutoff, level of theory, errors and licence of the model.

    Raises
    ------
    ModelFileError
        If the model cannot be opened or is not what it claims to be.
    ValueError
        For an unknown `forces`, `device` or `precision`, a `max_neighbors` below 1, `inner_steps` neither 1 nor even, ``"mts-fast"`` of a model
        without a fast network, or forces that a model was not trained for.

    Notes
    -----
    It tells the C library, where that is glibc and for the whole process, to keep up to 512 MB of freed memory for the next step instead of giving it
    back to the system (`openmm_se3.allocator`). Any of the environment variables ``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``,
    ``MALLOC_MMAP_MAX_`` and ``GLIBC_TUNABLES`` prevents that.

    Examples
    --------
    >>> potential = SE3Potential("se3-ani1x")  # doctest: +SKIP
    >>> system = potential.createSystem(pdb.topology)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Path = "se3-ani1x",
        forces: str = "direct",
        device: str | None = None,
        precision: str = "single",
        max_neighbors: int | None = None,
        cuda_graphs: bool = True,
        inner_steps: int | None = None,
    ) -> None:
        if forces not in FORCE_MODES:
            raise ValueError(f"forces must be one of {', '.join(map(repr, FORCE_MODES))}, got {forces!r}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
        try:
            kind = None if device is None else torch.device(device).type
        except RuntimeError as error:
            raise ValueError(f"device must be None or a torch device such as 'cpu' or 'cuda', got {device!r} ({error})") from None
        if kind not in (None, "cpu", "cuda"):
            raise ValueError(f"device must be None, 'cpu' or 'cuda', got {device!r}: the model was not made for other devices")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {device!r} was asked for, but torch {torch.__version__} sees no GPU; use device='cpu' or mend the installation")
        if max_neighbors is not None and not (isinstance(max_neighbors, Integral) and max_neighbors >= 1):
            raise ValueError(f"max_neighbors must be a whole number of at least 1, or None for any number, got {max_neighbors}")
        if inner_steps is not None and not may_be_inner_steps(inner_steps):
            raise ValueError(f"inner_steps must be 1 or even, as those of MultipleTimeStepIntegrator, or None, got {inner_steps}")
        self.forces = forces
        self.device = device
        self.precision = precision
        self.max_neighbors: int | None = max_neighbors
        self.cuda_graphs = cuda_graphs
        self.inner_steps = inner_steps
        self.model = load_model(model)
        self.metadata: ModelMetadata = self.model.metadata
        if forces not in modes_of(self.model):
            raise ValueError(_what_is_missing(self.metadata, forces))
        self.model.to(PRECISIONS[precision])
        keep_freed_memory()

    def __getstate__(self) -> dict[str, Any]:
        """For `pickle`, which workers of `multiprocessing` need: the module as the bytes of its file."""
        return self.__dict__ | {"model": module_to_bytes(self.model)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"model": module_from_bytes(state["model"])})
        self.model.metadata = self.metadata

    def addForces(
        self,
        topology: app.Topology,
        system: openmm.System,
        atoms: Sequence[int] | None = None,
        forceGroup: int = 0,
        scaleParameter: str | None = None,
        batch: Sequence[int] | None = None,
    ) -> list[openmm.Force]:
        """Add the model to a System.

        Parameters
        ----------
        topology : openmm.app.Topology
            Tells elements and box; the System may have been made by any means.
        system : openmm.System
            What to add to; nothing else in it changes.
        atoms : sequence of int, optional
            Atoms that the model describes, in any order; all by default.
        forceGroup : int
            Force group of the added force; for multiple time steps the second force is in the group after it.
        scaleParameter : str, optional
            Name of a global parameter, 1 by default in a new Context, that multiplies the energy and the forces;
            ``getEnergyParameterDerivatives`` then gives the derivative of the energy with respect to it.
        batch : sequence of int, optional
            For each of `atoms` the index of its molecule: those of different molecules do not see each other, wherever they are. Without a
            periodic box only. One force with 8 copies of a small molecule, which `replicate` makes, costs less than 8 forces with one each.

        Returns
        -------
        list of openmm.Force
            The forces that were added.

        Raises
        ------
        UnsupportedSystemError
            If the model cannot describe these atoms or this box, or topology and System disagree.
        ValueError
            For an unusable `forceGroup`, `scaleParameter` or `batch`.

        Warns
        -----
        UserWarning
            For multiple time steps of a System with virtual sites, which only GPU platforms integrate correctly; for atoms that a force of this
            package drives already, unless `scaleParameter` is given; and where the System's box is not that of the topology, or its nonbonded
            forces have none.
        """
        if self.forces in MULTIPLE_TIME_STEPS:
            warn_of_virtual_sites(system)
        added = self._makeForces(topology, system, atoms, forceGroup, scaleParameter, batch)
        for force in added:
            system.addForce(force)
        return added

    def _makeForces(
        self,
        topology: app.Topology,
        system: openmm.System,
        atoms: Sequence[int] | None,
        forceGroup: int,
        scaleParameter: str | None,
        batch: Sequence[int] | None = None,
        interpolated: openmm.System | None = None,
    ) -> list[openmm.Force]:
        """What `addForces` adds; scaled by openmm-ml's parameter where it interpolates between the model and the System `interpolated`.

        Forces are then first added to an empty System, which knows neither particles nor box.
        """
        if scaleParameter is not None and (not scaleParameter.isidentifier() or scaleParameter == INTERPOLATION_PARAMETER):
            raise ValueError(
                f"scaleParameter must be a name such as 'lambda_se3', got {scaleParameter!r}"
                + (", which openmm-ml uses for interpolation" if scaleParameter == INTERPOLATION_PARAMETER else "")
            )
        indices, numbers = model_atoms(topology, atoms, self.metadata)
        if interpolated is None and system.getNumParticles() > 0:
            require_same_particles(topology, system)
        whole = system if interpolated is None else interpolated
        box = topology.getPeriodicBoxVectors()
        periodic = box is not None or (whole.getNumParticles() > 0 and whole.usesPeriodicBoundaryConditions())
        if periodic:
            check_box(box if box is not None else whole.getDefaultPeriodicBoxVectors(), self.metadata)
        if whole.getNumParticles() > 0:
            if box is not None:
                _warn_of_another_box(box, whole)
                _warn_of_forces_without_box(whole)
            if scaleParameter is None:
                _warn_of_atoms_counted_twice(indices, whole)
        return create_forces(
            model=self.model,
            metadata=self.metadata,
            atomic_numbers=numbers,
            atoms=indices,
            n_particles=topology.getNumAtoms(),
            periodic=periodic,
            forces=self.forces,
            force_group=forceGroup,
            device=self.device,
            groups=None if batch is None else check_batch(batch, len(indices), periodic),
            max_neighbors=self.max_neighbors,
            cuda_graphs=self.cuda_graphs,
            inner_steps=self.inner_steps,
            scale_parameters=({INTERPOLATION_PARAMETER: False} if interpolated is not None else {})
            | ({scaleParameter: True} if scaleParameter else {}),
        )

    def createSystem(
        self,
        topology: app.Topology,
        removeCMMotion: bool = True,
        hydrogenMass: Any = None,
        forceGroup: int = 0,
        scaleParameter: str | None = None,
        batch: Sequence[int] | None = None,
    ) -> openmm.System:
        """Make a System in which the model drives all atoms.

        Parameters
        ----------
        topology : openmm.app.Topology
            Elements give the masses; its box, if any, makes the System periodic.
        removeCMMotion : bool
            Whether to add a CMMotionRemover.
        hydrogenMass : openmm.unit.Quantity or float, optional
            Mass of hydrogens, dalton if it has no unit, taken from the atoms that they are bonded to in `topology`; by default their own.
        forceGroup, scaleParameter, batch
            As in `addForces`.

        Returns
        -------
        openmm.System
            Without constraints: the model describes bonds to hydrogen too, so use steps of 0.5 to 1 fs.

        Raises
        ------
        UnsupportedSystemError, ValueError
            As `addForces` and `openmm_se3.masses.repartition_hydrogen_mass`.
        """
        model_atoms(topology, None, self.metadata)
        system = openmm.System()
        box = topology.getPeriodicBoxVectors()
        if box is not None:
            system.setDefaultPeriodicBoxVectors(*box)
        for atom in topology.atoms():
            system.addParticle(atom.element.mass)
        if hydrogenMass is not None:
            repartition_hydrogen_mass(topology, system, hydrogenMass)
        self.addForces(topology, system, forceGroup=forceGroup, scaleParameter=scaleParameter, batch=batch)
        if removeCMMotion:
            system.addForce(openmm.CMMotionRemover())
        return system

    def createMixedSystem(
        self, topology: app.Topology, system: openmm.System, atoms: Sequence[int], interpolate: bool = False, **args: Any
    ) -> openmm.System:
        """Replace the classical interactions inside a set of atoms by the model (mechanical embedding).

        Parameters
        ----------
        topology : openmm.app.Topology
            All atoms.
        system : openmm.System
            Classical System of all atoms, such as ``ForceField.createSystem`` makes; it is not changed.
        atoms : sequence of int
            Atoms that the model describes.
        interpolate : bool
            Add a global parameter ``lambda_interpolate``, 0 for classical and 1 for the model.
        **args
            Handed to ``openmmml.MLPotential.createMixedSystem``, which does the work; ``scaleParameter`` as in `addForces`.

        Returns
        -------
        openmm.System
            The mixed System; or what openmm-ml returns with ``returnInfo=True``. For multiple time steps the classical forces and
            those of the inner steps are in group 0 and the others in group 1.

        Raises
        ------
        ImportError
            If openmm-ml is not installed.
        UnsupportedSystemError, ValueError
            As `addForces`; and for Drude particles on `atoms`, or multiple time steps in another ``forceGroup`` than 0.

        Warns
        -----
        UserWarning
            If `interpolate` ends at a force field in which bonds between `atoms` are constraints, which openmm-ml removes.
        """
        try:
            from openmmml import MLPotential
        except ImportError as error:
            raise ImportError("createMixedSystem uses openmm-ml: pip install 'openmmml>=1.8' or conda install -c conda-forge openmm-ml") from error
        from openmm_se3.openmmml_plugin import SE3PotentialImplFactory

        atoms = list(atoms)
        model_atoms(topology, atoms, self.metadata)
        MLPotential.registerImplFactory("se3", SE3PotentialImplFactory())
        potential = MLPotential("se3", potential=self)
        return potential.createMixedSystem(topology, system, atoms, interpolate=interpolate, **args)
