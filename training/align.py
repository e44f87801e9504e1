"""Labels of several levels of theory on one scale: what two levels differ by is, to first order, an energy per element."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL
from ase.data import chemical_symbols

from training.data.batches import assemble
from training.data.frames import DataError, FrameBlock
from training.evaluate import Evaluator, open_model

#: Frames of a file that are compared; the means over them are what counts, and those need no more.
SAMPLE = 200


@dataclass(frozen=True)
class LevelShift:
    """How the total energies of a file differ from those of a model, at the same geometries.

    Attributes
    ----------
    per_element : dict
        Atomic number to eV: least-squares solution of label - model = sum_z n_z d_z, of minimum norm where compositions do not determine it.
    rms_before, rms_after : float
        Root-mean-square difference per atom without and with these, eV.
    """

    per_element: dict[int, float]
    rms_before: float
    rms_after: float


class ModelReference:
    """A model whose total energies are the common scale.

    Fitting self-energies to each file by itself would also take away what their molecules differ in, such as the strain of stretched bonds;
    differences at the same geometries leave that alone.

    Parameters
    ----------
    model : str
        Checkpoint, exported file or name of a released model; errors as those of their readers.
    """

    def __init__(self, model: str) -> None:
        self._evaluator: Evaluator = open_model(model)
        self.name = self._evaluator.name
        self.self_energies = {NUMBER_OF_SYMBOL[symbol]: energy for symbol, energy in self._evaluator.self_energies.items()}

    def shift(self, blocks: Iterable[FrameBlock]) -> LevelShift:
        """Compare the energies of a file with the model's, on `SAMPLE` frames of it at random, and one of each element that these lack.

        Raises
        ------
        DataError
            For an empty file, and for elements that the model does not know or has no self-energy of.
        """
        rng = np.random.default_rng(0)
        kept: list[tuple[FrameBlock, int]] = []
        seen = 0
        first_with: dict[int, tuple[FrameBlock, int]] = {}
        for block in blocks:
            for z in {int(z) for z in block.atomic_numbers} - first_with.keys():
                first_with[z] = (block, 0)
            for i in range(len(block.energies)):  # reservoir sampling: each frame is kept with the same chance, whatever their number
                seen += 1
                place = len(kept) if len(kept) < SAMPLE else int(rng.integers(seen))
                if place < SAMPLE:
                    kept[place : place + 1] = [(block, i)]
        if not kept:
            raise DataError("no usable frame to compare with the model")
        index = {z: k for k, z in enumerate(self._evaluator.atomic_numbers)}
        sampled = {int(z) for block, _ in kept for z in block.atomic_numbers}
        kept += [frame for z, frame in first_with.items() if z not in sampled]  # rare elements have a shift, too
        held = set(first_with)
        unknown = sorted(held - index.keys())
        if unknown:
            raise DataError(
                f"the data hold {', '.join(chemical_symbols[z] for z in unknown)}, which {self.name} does not know: energies cannot be aligned"
            )
        references = self._evaluator.self_energy_table(chemical_symbols[z] for z in sorted(held))
        differences, counts = np.zeros(len(kept)), np.zeros((len(kept), len(index)))
        for k, (block, i) in enumerate(kept):
            species = np.array([index[int(z)] for z in block.atomic_numbers])
            batch = assemble(
                species, block.coordinates[i], np.array([0, len(species)]), block.energies[i : i + 1], None, np.zeros(1), self._evaluator.cutoff
            )
            with torch.no_grad():
                energy = float(self._evaluator.run(batch, False)[0])
            differences[k] = block.energies[i] - energy - references[block.atomic_numbers].sum()
            counts[k] = np.bincount(species, minlength=len(index))
        solution = np.linalg.lstsq(counts, differences, rcond=1e-9)[0]
        n_atoms = counts.sum(1)
        after = differences - counts @ solution
        return LevelShift(
            {z: float(solution[k]) for z, k in index.items() if counts[:, k].any()},
            float(np.sqrt(np.mean(np.square(differences / n_atoms)))),
            float(np.sqrt(np.mean(np.square(after / n_atoms)))),
        )
