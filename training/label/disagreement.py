"""Query by committee: where several models disagree, none of them knows (Smith et al., J. Chem. Phys. 148, 241733 (2018))."""

from ase import Atoms

from training.label.errors import LabelError


class Committee:
    """Models whose disagreement is measured.

    Parameters
    ----------
    models : list of str
        Two or more exported files or names of released models.

    Raises
    ------
    LabelError
        For fewer than two models, or the same one twice.
    ModelFileError
        For a model that cannot be opened.
    """

    def __init__(self, models: list[str]) -> None:
        # torch takes seconds to import, and only a committee needs it.
        from openmm_se3.model_file import load_model

        if len(models) < 2:
            raise LabelError(f"a committee needs at least two models, got {len(models)}; one model cannot disagree with itself")
        self._models = [load_model(m) for m in models]
        if len({m.metadata.weights_sha256 for m in self._models}) < len(models):
            raise LabelError(f"the committee holds the same weights twice ({', '.join(models)}); give models of different training runs")
        self._conservative = any("direct" in m.metadata.untrained for m in self._models)
        self._elements = set.intersection(*(set(m.metadata.elements) for m in self._models))

    def require_elements(self, symbols: set[str]) -> None:
        """Refuse elements that not every model knows.

        Raises
        ------
        LabelError
            Naming them.
        """
        unknown = sorted(symbols - self._elements)
        if unknown:
            raise LabelError(f"the input holds {', '.join(unknown)}, which not every model of the committee knows; leave it out, or the committee")

    def disagreement(self, atoms: Atoms) -> float:
        """Largest standard deviation, over the models, of the direct force on an atom; of the conservative, where one is not trained for direct ones.

        Parameters
        ----------
        atoms : ase.Atoms
            A molecule.

        Returns
        -------
        float
            max_i sqrt(<|F_i - <F_i>|^2>), eV/Angstrom.
        """
        import torch

        from training.committee import force_deviations
        from training.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV

        positions = torch.tensor(atoms.positions, dtype=torch.float64) / ANGSTROM_PER_NM
        numbers = torch.tensor(atoms.numbers, dtype=torch.int64)
        of_models = [(m.conservative_and_direct if self._conservative else m)(positions, numbers, None)[1] for m in self._models]
        return float(force_deviations(torch.stack(of_models) / KJ_PER_MOL_PER_EV / ANGSTROM_PER_NM).max())
