"""CUDA graphs: whether a force can be replayed as one, found by capturing and comparing it; and the widths that give it fixed shapes.

A small network costs a GPU less than launching its kernels costs the processor. A graph launches all of them at once, but it repeats what was
captured, shapes and addresses, whatever the positions. So graphs are for forces of fixed shapes: up to `all_pairs_up_to` atoms of the model all
pairs are computed, and up to `fixed_width_up_to` a neighbour matrix whose width was given. An atom with more neighbours than that makes energy and
forces NaN at that step.
"""

import io
import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from openmm_se3.binding import Term
from openmm_se3.checks import in_nanometers
from openmm_se3.model_file import module_from_bytes, module_to_bytes

#: Neighbours per atom that a run may gain over its start before a given width is too small.
MARGIN = 1.15
#: Largest deviation of a replayed force from that of an evaluation, over the largest force; sums in another order differ by 1e-6.
TOLERANCE = 1e-4
#: Distance (nm) of the atoms whose forces are compared, those of a liquid's molecules: nowhere more neighbours than a width made for a molecule.
SPACING_NM = 0.25

_outcomes: weakref.WeakKeyDictionary[torch.jit.ScriptModule, dict[tuple[str, bool, bool, bool], str | None]] = weakref.WeakKeyDictionary()


def width_for(positions: np.ndarray, vectors: Any, cutoff_nm: float) -> int:
    """Width of a neighbour matrix for a run that starts here: the most neighbours of an atom, and 15% more.

    Parameters
    ----------
    positions : ndarray
        ``(n_atoms, 3)`` nm, of the atoms that the model describes.
    vectors : Quantity, ndarray or None
        Box vectors, nm if they have no unit; None without periodic boundaries.
    cutoff_nm : float
        Cutoff of the model.

    Returns
    -------
    int
        A multiple of 8, for `SE3Potential`'s `max_neighbors`.
    """
    from ase.neighborlist import primitive_neighbor_list

    box = np.eye(3) if vectors is None else in_nanometers(vectors, 3)
    # In Angstrom, since ASE sorts atoms into cells of a few of whatever unit it is given.
    receivers = primitive_neighbor_list("i", [vectors is not None] * 3, 10 * box, 10 * np.asarray(positions), 10 * cutoff_nm)
    most = np.bincount(receivers).max() if len(receivers) else 0
    return 8 * max(1, math.ceil(MARGIN * most / 8))


def with_width(model: torch.jit.ScriptModule, max_neighbors: int) -> torch.jit.ScriptModule:
    """A copy of a model whose neighbour matrices have a given width; the model itself if it is from before they could."""
    if not hasattr(model, "max_neighbors"):
        return model
    copy = module_from_bytes(module_to_bytes(model))
    for module in (copy, getattr(copy, "fast_model", None)):
        if module is not None:
            module.max_neighbors = max_neighbors
    return copy


def needs_width(model: torch.jit.ScriptModule, n_atoms: int) -> bool:
    """Whether a model of `load_model` computes so many atoms with shapes that never change if it has a width, and not without."""
    return hasattr(model, "max_neighbors") and model.all_pairs_up_to < n_atoms <= model.fixed_width_up_to


def has_fixed_shapes(model: torch.jit.ScriptModule, n_atoms: int) -> bool:
    """Whether a model of `load_model` or `with_width` computes so many atoms on a GPU with shapes that never change."""
    if n_atoms < 2 or not hasattr(model, "max_neighbors"):
        return False
    return n_atoms <= model.all_pairs_up_to or (model.max_neighbors > 0 and needs_width(model, n_atoms))


def capture_problem(
    model: torch.jit.ScriptModule,
    bound: torch.nn.Module,
    term: Term,
    atoms: Sequence[int],
    n_particles: int,
    box_nm: float | None,
    apart: bool,
) -> str | None:
    """Why a force cannot be replayed as a CUDA graph, or None: it is captured on the GPU, replayed at other positions, and compared.

    Of every model one force of each kind is tried, and what came out is said of the others.

    Parameters
    ----------
    model : ScriptModule
        What `load_model` returned.
    bound : torch.nn.Module
        From `openmm_se3.binding.bind`, perhaps of a copy of the model.
    term : Term
        Which force.
    atoms : sequence of int
        Those of the particles that the model describes.
    n_particles : int
        Particles of the System.
    box_nm : float or None
        Least edge of a periodic box that the model can do with; None without one.
    apart : bool
        Whether `bound` is of copies that do not see each other, `openmm_se3.replicas.keep_apart`.

    Returns
    -------
    str or None
        A sentence without a full stop.
    """
    kind = (term.name, box_nm is not None, len(atoms) <= model.all_pairs_up_to, apart)
    outcomes = _outcomes.setdefault(model, {})
    if kind not in outcomes:
        outcomes[kind] = _try(bound, atoms, n_particles, box_nm)
    return outcomes[kind]


def _try(bound: torch.nn.Module, atoms: Sequence[int], n_particles: int, box_nm: float | None) -> str | None:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(bound), file)
    file.seek(0)
    alive = torch.jit.load(file, map_location="cuda").eval()
    module = torch.jit.freeze(alive)  # as TorchForce does
    dtype = next((b.dtype for b in alive.buffers() if b.is_floating_point()), torch.float32)
    here, there, box = (torch.tensor(a, dtype=dtype, device="cuda") for a in _structures(atoms, n_particles, box_nm))
    arguments = (here,) if box_nm is None else (here, box)
    try:
        # Not optimised, since that takes seconds; what would keep a graph from being captured is in the operators.
        with torch.jit.optimized_execution(False):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                module(*arguments)
            torch.cuda.synchronize()
            # As TorchForce does it: two graphs, of which it replays either and reads what the second one was captured with.
            graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
            for graph in graphs:
                with torch.cuda.graph(graph, stream=stream):
                    energy, forces = module(*arguments)
            here.copy_(there)
            graphs[0].replay()
            found_energy, found = energy.clone(), forces.clone()
            right_energy, right = module(*arguments)
        return _difference(found_energy, found, right_energy, right)
    except RuntimeError as error:
        return f"capturing failed ({str(error).strip().splitlines()[0]})"


def _difference(found_energy: torch.Tensor, found: torch.Tensor, right_energy: torch.Tensor, right: torch.Tensor) -> str | None:
    """What to say of replayed forces and energy that are not those evaluated, or None."""
    largest, force_error = float(right.abs().amax()), float((found - right).abs().amax())
    if not force_error <= TOLERANCE * largest:  # nor where it is NaN
        return f"replayed forces differ by {force_error:.1e} kJ/mol/nm from those evaluated, of which the largest is {largest:.1e}"
    energy, energy_error = float(right_energy), float((found_energy - right_energy).abs())
    if not energy_error <= TOLERANCE * max(1.0, abs(energy)):
        return f"the replayed energy differs by {energy_error:.1e} kJ/mol from that evaluated, {energy:.1e}"
    return None


def _structures(atoms: Sequence[int], n_particles: int, box_nm: float | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two structures (nm) with the model's atoms near a grid, and a box around them."""
    edge = math.ceil(len(atoms) ** (1 / 3) - 1e-9)
    rng = np.random.default_rng(0)
    grid = SPACING_NM * np.stack(np.unravel_index(np.arange(len(atoms)), (edge, edge, edge)), axis=1)
    out = []
    for _ in range(2):
        x = np.zeros((n_particles, 3))
        x[np.asarray(atoms)] = grid + rng.uniform(-0.03, 0.03, grid.shape)
        out.append(x)
    return out[0], out[1], np.eye(3) * max(box_nm or 0.0, SPACING_NM * (edge + 1))
