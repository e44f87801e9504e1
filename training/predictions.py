"""Labels and predictions side by side, frame by frame, as extended XYZ: to look for the frames that a model fails on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import write

from training.data.packed import PackedDataset


@dataclass
class Prediction:
    """What a model says of one frame, eV and eV/Angstrom.

    Attributes
    ----------
    frame : int
        Index in the data set.
    energy_error : float
        Energy less that of the label.
    direct : ndarray
        ``(n_atoms, 3)``.
    conservative : ndarray or None
        ``(n_atoms, 3)``; None where the energy was not differentiated.
    """

    frame: int
    energy_error: float
    direct: np.ndarray
    conservative: np.ndarray | None


def write_predictions(path: Path, dataset: PackedDataset, predictions: Sequence[Prediction]) -> None:
    """Write frames in the order of the data set, in eV and Angstrom.

    Of each frame ``energy`` and ``forces`` are the labels, ``model_energy``, ``model_direct_forces`` and ``model_conservative_forces`` what the model
    says, all energies total ones; ``frame`` is its index in the data set.

    Parameters
    ----------
    path : Path
        File to write.
    dataset : PackedDataset
        What was evaluated.
    predictions : sequence of Prediction
        In any order.
    """
    frames = []
    for prediction in sorted(predictions, key=lambda p: p.frame):
        of_frame = slice(dataset.offsets[prediction.frame], dataset.offsets[prediction.frame + 1])
        energy = float(dataset.energies[prediction.frame])
        atoms = Atoms(dataset.numbers[of_frame], positions=dataset.coordinates[of_frame])
        atoms.info |= {"frame": prediction.frame, "energy": energy, "model_energy": energy + prediction.energy_error}
        if dataset.forces is not None:
            atoms.set_array("forces", np.asarray(dataset.forces[of_frame], dtype=np.float64))
        atoms.set_array("model_direct_forces", prediction.direct)
        if prediction.conservative is not None:
            atoms.set_array("model_conservative_forces", prediction.conservative)
        frames.append(atoms)
    write(path, frames, format="extxyz")
