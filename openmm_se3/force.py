"""Bind a model to the atoms and the box of one System; the only file that knows `TorchForce`."""

import contextlib
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import openmm
import torch
from openmm import app, unit
from torch import Tensor

from openmm_se3.binding import MULTIPLE_TIME_STEPS, TERMS, Term, bind, in_place, scale
from openmm_se3.checks import atom_indices
from openmm_se3.cuda_graphs import capture_problem, has_fixed_shapes, needs_width, with_width
from openmm_se3.errors import UnsupportedSystemError
from openmm_se3.installation import MEND, openmmtorch_mismatch
from openmm_se3.model_file import ModelMetadata
from openmm_se3.platforms import has_gpu
from openmm_se3.python_force import create_python_force
from openmm_se3.replicas import keep_apart
from openmm_se3.serialisation import mend_serialisation

#: How the model can be put into a System.
BACKENDS = ("TorchForce", "PythonForce")

_UNKNOWN = "not looked for yet"
_problem: str | None = _UNKNOWN


def require_same_particles(topology: app.Topology, system: openmm.System) -> None:
    """Refuse a System with other particles than the topology has atoms.

    Parameters
    ----------
    topology : openmm.app.Topology
        All atoms.
    system : openmm.System
        That is to be of the same atoms.

    Raises
    ------
    UnsupportedSystemError
        With both numbers.
    """
    if system.getNumParticles() != topology.getNumAtoms():
        raise UnsupportedSystemError(
            f"the topology has {topology.getNumAtoms()} atoms, but the System has {system.getNumParticles()} particles; make both from the same "
            "structure (virtual sites must be in the topology too, for example through Modeller.addExtraParticles)"
        )


def model_atoms(topology: app.Topology, atoms: Sequence[int] | None, metadata: ModelMetadata) -> tuple[list[int], list[int]]:
    """Indices and atomic numbers of the atoms that the model is to describe.

    Parameters
    ----------
    topology : openmm.app.Topology
        All atoms of the System.
    atoms : sequence of int or None
        Indices in any order, None for all atoms.
    metadata : ModelMetadata
        Tells the elements that the model knows.

    Returns
    -------
    tuple of list
        Indices in the order given, and their atomic numbers.

    Raises
    ------
    TypeError
        If `atoms` holds what is no index, such as the bools of a mask.
    UnsupportedSystemError
        If there are no atoms, an index is out of range or repeated, an element is missing or the model does not know it.
    """
    everything = list(topology.atoms())
    indices = list(range(len(everything))) if atoms is None else atom_indices(atoms, len(everything))
    if not indices:
        raise UnsupportedSystemError("no atoms: the topology or the list of atoms is empty; the model needs at least one atom")
    nameless = [i for i in indices if everything[i].element is None]
    if nameless:
        raise UnsupportedSystemError(
            f"atoms {nameless[:5]} have no element (virtual sites, or a structure file without elements); "
            "give them elements or leave them out of atoms"
        )
    # By number, since deuterium is to the model what hydrogen is; the mass of a particle is that of its own element.
    symbols = [app.Element.getByAtomicNumber(everything[i].element.atomic_number).symbol for i in indices]
    unknown = sorted(set(symbols) - set(metadata.elements))
    if unknown:
        raise UnsupportedSystemError(
            f"model {metadata.name!r} was not trained on {', '.join(unknown)}; it knows {', '.join(metadata.elements)}. "
            f"Leave those atoms (the first: {[i for i, s in zip(indices, symbols, strict=True) if s in unknown][:5]}) to a classical force field "
            "(atoms=...), or train a model on them."
        )
    return indices, [everything[i].element.atomic_number for i in indices]


def warn_of_virtual_sites(system: openmm.System) -> None:
    """Say that multiple time steps are wrong with virtual sites where OpenMM computes on a CPU.

    Parameters
    ----------
    system : openmm.System
        That is to be driven by them.

    Warns
    -----
    UserWarning
        If it has virtual sites.
    """
    sites = [i for i in range(system.getNumParticles()) if system.isVirtualSite(i)]
    if sites:
        warnings.warn(
            f"the System has {len(sites)} virtual sites (the first: particle {sites[0]}). Within a step of a CustomIntegrator, as those for multiple "
            "time steps are, OpenMM's Reference and CPU platforms leave them where they were, and the energy runs away: run this System on a GPU "
            "platform, or use forces='conservative'",
            stacklevel=3,
        )


def create_forces(
    model: torch.jit.ScriptModule,
    metadata: ModelMetadata,
    atomic_numbers: Sequence[int],
    atoms: Sequence[int],
    n_particles: int,
    periodic: bool,
    forces: str,
    force_group: int,
    scale_parameters: Mapping[str, bool] | None = None,
    device: str | None = None,
    backend: str | None = None,
    groups: Sequence[int] | None = None,
    max_neighbors: int | None = None,
    cuda_graphs: bool = True,
    inner_steps: int | None = None,
) -> list[openmm.Force]:
    """Make the OpenMM forces that drive the given atoms by the model.

    Parameters
    ----------
    model : ScriptModule
        What `load_model` returns, in the wanted precision.
    metadata : ModelMetadata
        Of that model.
    atomic_numbers, atoms : sequence of int
        From `model_atoms`.
    n_particles : int
        Particles of the System.
    periodic : bool
        Whether the System is periodic.
    forces : str
        One of `FORCE_MODES`.
    force_group : int
        Force group of the first force; the second for multiple time steps is in the group after it.
    scale_parameters : mapping of str to bool, optional
        At most two global parameters, 1 by default, that multiply energy and forces; and whether to offer the energy's derivatives.
    device : str, optional
        Torch device of a PythonForce; a TorchForce is where the Platform is.
    backend : str, optional
        One of `BACKENDS`; by default TorchForce, or PythonForce, with a warning, where TorchForce cannot be used.
    groups : sequence of int, optional
        From `openmm_se3.replicas.check_batch`: atoms of different groups do not see each other.
    max_neighbors, cuda_graphs, inner_steps
        As of `SE3Potential`.

    Returns
    -------
    list of openmm.Force
        One force, or two for multiple time steps.

    Raises
    ------
    ImportError
        If TorchForce cannot be used and this OpenMM has no PythonForce.
    ValueError
        If there is no such force group.
    """
    if backend is None:
        backend = _choose_backend()
    original = model
    if groups is not None and max(groups) == 0:
        groups = None
    if groups is not None and max_neighbors is None and has_gpu():
        max_neighbors = int(np.bincount(groups).max())  # no atom has more
    if max_neighbors is not None and needs_width(model, len(atoms)):
        model = with_width(model, max_neighbors)
    graphs = cuda_graphs and backend == "TorchForce" and not scale_parameters and has_fixed_shapes(model, len(atoms)) and has_gpu()
    if groups is not None:
        model = torch.jit.script(keep_apart(model, groups, metadata.cutoff_nm))
    scales = scale_parameters or {}
    terms = TERMS[forces]
    if forces not in MULTIPLE_TIME_STEPS:
        inner_steps = None
    if not 0 <= force_group <= 31 - terms[-1].group_offset:
        raise ValueError(f"forceGroup must be from 0 to {31 - terms[-1].group_offset} with forces={forces!r}, got {force_group}")
    made = []
    for term in terms:
        force: openmm.Force
        if backend == "PythonForce":
            force = create_python_force(model, term, atomic_numbers, atoms, periodic, scales, device, inner_steps)
        else:
            bound = bind(model, term, atomic_numbers, atoms, n_particles, inner_steps)
            if graphs:
                bound = in_place(bound)
            force = _create_torch_force(bound, term, periodic, scales)
            if graphs:
                problem = capture_problem(
                    original, bound, term, atoms, n_particles, 2.1 * metadata.cutoff_nm if periodic else None, groups is not None
                )
                _announce(problem, metadata, term)
                force.setProperty("useCUDAGraphs", "true" if problem is None else "false")
        force.setForceGroup(force_group + term.group_offset)
        force.setName(f"SE3Force({metadata.name}, {term.name}, atoms {_as_ranges(atoms)})")
        made.append(force)
    return made


def _as_ranges(atoms: Sequence[int]) -> str:
    """Such as ``0-8, 12``."""
    ordered = np.array(sorted(atoms))
    runs = np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def atoms_of_forces(system: openmm.System) -> set[int]:
    """Atoms that forces of this package drive already, by the names of those; a System read from XML has lost the names."""
    found: set[int] = set()
    for force in system.getForces():
        named = re.fullmatch(r"SE3Force\(.*, atoms ([-0-9, ]+)\)", force.getName())
        for run in named[1].split(", ") if named else []:
            first, _, last = run.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found


def _create_torch_force(bound: torch.nn.Module, term: Term, periodic: bool, scale_parameters: Mapping[str, bool]) -> openmm.Force:
    if scale_parameters:
        bound = scale(bound, periodic)
    force = _import_torch_force()(torch.jit.script(bound))
    force.setOutputsForces(True)
    force.setUsesPeriodicBoundaryConditions(periodic)
    for name, derivative in scale_parameters.items():
        force.addGlobalParameter(name, 1.0)
        if derivative and term.carries_energy:
            force.addEnergyParameterDerivative(name)
    return force


def _announce(problem: str | None, metadata: ModelMetadata, term: Term) -> None:
    """Say what keeps a force from being a CUDA graph."""
    if problem is not None:
        warnings.warn(
            f"{metadata.name} ({term.name}) runs without CUDA graphs, which costs some milliseconds for each step of a small system: {problem}. "
            "cuda_graphs=False keeps this from being tried",
            stacklevel=4,
        )


def _load_late() -> None:
    """Load what OpenMM could not when it was imported: the libraries of a torch that is in another place are found only once that is imported."""
    for failure in openmm.Platform.getPluginLoadFailures():
        found = re.match(r"Error loading library (.*OpenMMTorch[^/]*?): ", failure)
        if found:
            with contextlib.suppress(openmm.OpenMMException):  # those of platforms that are not there
                openmm.Platform.loadPluginLibrary(found[1])


def _import_torch_force() -> Any:
    level = logging.root.manager.disable  # the user's own
    try:
        # openmmtorch imports the deprecated name of OpenMM, which logs a warning that no user of ours can act on.
        logging.disable(max(level, logging.WARNING))
        from openmmtorch import TorchForce
    finally:
        logging.disable(level)
    mend_serialisation()
    return TorchForce


class _Probe(torch.nn.Module):
    """The sum of the squares of all coordinates."""

    def forward(self, positions: Tensor) -> Tensor:
        return (positions * positions).sum()


def torch_force_problem() -> str | None:
    """Why TorchForce cannot be used here, or None: found by using it, since a mismatch may show only then.

    Returns
    -------
    str or None
        What went wrong, and the versions that do not fit.
    """
    mismatch = openmmtorch_mismatch()
    if mismatch is not None:  # a wrong pair may crash the process, so do not try
        return mismatch
    try:
        force = _import_torch_force()(torch.jit.script(_Probe()))
        _load_late()
        system = openmm.System()
        system.addParticle(1.0)
        system.addForce(force)
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
        context.setPositions([openmm.Vec3(1, 2, 3)])
        energy = context.getState(getEnergy=True, getForces=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    except Exception as error:  # a linker's error, OpenMM's, torch's: all mean the same to the user
        reason = str(error).strip().split("\n")[-1]
        return f"openmm-torch does not work with torch {torch.__version__} and OpenMM {openmm.version.version} ({type(error).__name__}: {reason})"
    return None if energy == 14.0 else f"openmm-torch gives {energy} kJ/mol where 14 is right"


def _choose_backend() -> str:
    global _problem
    if _problem is _UNKNOWN:
        _problem = torch_force_problem()
    if _problem is None:
        return "TorchForce"
    if not hasattr(openmm, "PythonForce"):
        raise ImportError(f"{_problem}, and OpenMM {openmm.version.version} has no PythonForce to take its place. {MEND}")
    warnings.warn(
        f"{_problem}. The model runs through openmm.PythonForce instead: the same numbers, about a millisecond more for each step. {MEND} "
        "'openmm-se3 doctor' tells more.",
        stacklevel=2,
    )
    return "PythonForce"
