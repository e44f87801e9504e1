"""The modules that TorchForce evaluates, called from Python as it calls them: frozen, with positions that ask for a gradient."""

import warnings

import torch
from openmm import app, unit

from openmm_se3.binding import TERMS, bind, modes_of
from openmm_se3.model_file import load_model


def read(structure, device="cpu"):
    """Atomic numbers, positions (nm, float64) and box or None of a PDB file, on a device."""
    pdb = app.PDBFile(str(structure))
    numbers = [atom.element.atomic_number for atom in pdb.topology.atoms()]
    positions = torch.tensor(pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer), dtype=torch.float64, device=device)
    vectors = pdb.topology.getPeriodicBoxVectors()
    box = None if vectors is None else torch.tensor([list(v) for v in vectors.value_in_unit(unit.nanometer)], dtype=torch.float64, device=device)
    return numbers, positions, box


def force_modes(model):
    """Force modes that a model, by name or path, has."""
    return modes_of(load_model(model))


def evaluations(model, structure, modes, device="cpu"):
    """For each mode a function without arguments that evaluates all its forces once: ``{mode: function}``.

    With several forces (``mts``) the terms are separate functions, under the names of the terms.
    """
    numbers, positions, box = read(structure, device)
    out = {}
    opened = load_model(model)
    for mode in modes:
        for term in TERMS[mode]:
            bound = bind(opened, term, numbers, range(len(numbers)), len(numbers)).to(device)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript announces its end with every call
                scripted = torch.jit.script(bound)
                frozen = torch.jit.freeze(scripted)

            # The frozen module points into the one it was made of, which must outlive it.
            def once(frozen=frozen, alive=(bound, scripted)):
                return frozen(positions.detach().clone().requires_grad_(True), box)

            out[term.name] = once
    return out
