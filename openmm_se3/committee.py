"""`CommitteeReporter`: how much the members of a committee disagree along a simulation, and a stop where it is too much."""

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import openmm
import torch
from openmm import app, unit

from openmm_se3.atom_names import atom_names, listed
from openmm_se3.errors import UnsupportedSystemError
from openmm_se3.force import model_atoms
from openmm_se3.model_file import module_from_bytes, module_to_bytes
from openmm_se3.potential import SE3Potential
from openmm_se3.replicas import check_batch

ACTIONS = ("warn", "stop")
CSV_HEADER = ("step", "time_ps", "max_deviation_kj_per_mol_nm", "mean_deviation_kj_per_mol_nm", "atom")
_FORCE_UNIT = unit.kilojoule_per_mole / unit.nanometer


class UncertaintyError(openmm.OpenMMException):
    """The members of a committee disagree more than allowed; the message names the atoms."""


class UncertaintyWarning(UserWarning):
    """As `UncertaintyError`, where the simulation goes on."""


class CommitteeReporter:
    """Reporter of the standard deviation, over the members of a committee, of the force on each atom.

    Where the members disagree, none of them was taught (query by committee: Smith et al., J. Chem. Phys. 148, 241733 (2018)). What is
    compared are their direct forces, whatever mode drives the atoms. A report evaluates the committee once more, so it costs about a
    step. The members share data and architecture: where they agree, they may still all be wrong.

    Parameters
    ----------
    file : str, Path or text file
        CSV to write: step, time, largest and mean deviation, the atom with the largest.
    reportInterval : int
        Steps between reports.
    potential : SE3Potential
        Of a committee, which ``python -m training export A.ckpt B.ckpt OUT.pt`` makes. Its `device` and `precision` are used.
    topology : openmm.app.Topology
        Tells elements and names of the atoms; in `deviations`, without a `Simulation`, periodic if it has a box.
    atoms : sequence of int, optional
        The ML atoms of a mixed System; all by default. Where it cuts bonds, with the hydrogens that cap them, the last atoms of the topology that
        ``createMixedSystem(..., returnInfo=True)`` returns; give that topology.
    threshold : float or Quantity, optional
        Largest deviation allowed on any atom, kJ/mol/nm (1 eV/Angstrom is 965); None allows all. Errors of the model grow with the
        deviation, but are not equal to it: choose it from the deviations of structures that the model is known to describe.
    action : str
        Above the threshold: ``"warn"``, an `UncertaintyWarning` at each report, or ``"stop"``, an `UncertaintyError`.
    append : bool
        Add to an existing file, after a restart.
    batch : sequence of int, optional
        As given to `SE3Potential.addForces`: for each of `atoms` the index of its molecule. Each is looked at as if alone, one
        after another, so a report takes longer than a step.

    Raises
    ------
    ValueError
        If the model is no committee, or one that was not trained for direct forces, or for an unusable `reportInterval`, `threshold`,
        `action` or `batch`.
    UnsupportedSystemError
        If the model cannot describe these atoms, or they lack the caps of bonds that a mixed System cuts, or for a `batch` in a periodic box.

    Examples
    --------
    >>> potential = SE3Potential("committee.pt")  # doctest: +SKIP
    >>> reporter = CommitteeReporter("deviation.csv", 100, potential, topology, threshold=300, action="stop")  # doctest: +SKIP
    >>> simulation.reporters.append(reporter)  # doctest: +SKIP
    """

    def __init__(
        self,
        file: str | Path | TextIO,
        reportInterval: int,
        potential: SE3Potential,
        topology: app.Topology,
        atoms: Sequence[int] | None = None,
        threshold: Any = None,
        action: str = "warn",
        append: bool = False,
        batch: Sequence[int] | None = None,
    ) -> None:
        limit = threshold.value_in_unit(_FORCE_UNIT) if unit.is_quantity(threshold) else threshold
        if reportInterval <= 0:
            raise ValueError(f"reportInterval must be positive, got {reportInterval}")
        if limit is not None and not limit > 0:
            raise ValueError(f"threshold must be positive, or None to allow all, got {threshold}")
        if action not in ACTIONS:
            raise ValueError(f"action must be one of {', '.join(map(repr, ACTIONS))}, got {action!r}")
        if potential.metadata.n_members < 2:
            raise ValueError(
                f"model {potential.metadata.name!r} is one network, which cannot disagree with itself; a committee is exported from several "
                "training runs: python -m training export A.ckpt B.ckpt OUT.pt"
            )
        if "direct" in potential.metadata.untrained:
            raise ValueError(
                f"the members of committee {potential.metadata.name!r} were not trained for direct forces, which are what is compared; train them "
                "with loss.force_weight above 0"
            )
        self._interval, self._threshold, self._action = reportInterval, limit, action
        indices, numbers = model_atoms(topology, atoms, potential.metadata)
        _require_caps(topology, set(indices))
        self._atoms, self._numbers = np.array(indices), torch.tensor(numbers)
        self._names = atom_names(topology, indices)
        self._periodic = topology.getPeriodicBoxVectors() is not None
        of_atom = np.zeros(len(indices), dtype=int) if batch is None else np.array(check_batch(batch, len(indices), self._periodic))
        self._groups = [np.flatnonzero(of_atom == k) for k in range(of_atom.max() + 1)]
        # A copy, so that it can be on a device of its own.
        self._model = module_from_bytes(module_to_bytes(potential.model)).to(potential.device or "cpu")
        self._owned = isinstance(file, (str, Path))
        self._file: TextIO = open(file, "a" if append else "w", newline="") if isinstance(file, (str, Path)) else file  # noqa: SIM115 - lives as long
        self._writer = csv.writer(self._file)
        if not append:
            self._writer.writerow(CSV_HEADER)

    def __del__(self) -> None:
        if getattr(self, "_owned", False) and hasattr(self, "_file"):
            self._file.close()

    def describeNextReport(self, simulation: app.Simulation) -> dict:
        """Called by `Simulation`."""
        steps = self._interval - simulation.currentStep % self._interval
        return {"steps": steps, "periodic": None, "include": ["positions"]}

    def report(self, simulation: app.Simulation, state: openmm.State) -> None:
        """Called by `Simulation`: write one line, then compare with the threshold.

        Raises
        ------
        UncertaintyError
            If a deviation exceeds the threshold, or is not finite, and the action is ``"stop"``.
        """
        step = simulation.currentStep
        self._periodic = simulation.system.usesPeriodicBoundaryConditions()
        deviations = self.deviations(state)
        # Of what is not finite the first counts as the largest.
        largest = int(np.argmax(np.where(np.isfinite(deviations), deviations, np.inf)))
        time = state.getTime().value_in_unit(unit.picosecond)
        self._writer.writerow([step, f"{time:.8g}", f"{deviations[largest]:.6g}", f"{deviations.mean():.6g}", int(self._atoms[largest])])
        self._file.flush()
        if self._threshold is None:
            return
        above = np.flatnonzero(~(deviations <= self._threshold))
        if not len(above):
            return
        above = above[np.argsort(-deviations[above])]
        names = [f"{self._names[i]}: {deviations[i]:.4g}" for i in above]
        message = (
            f"step {step}: the members of the committee deviate by more than {self._threshold:g} kJ/mol/nm in the forces on {listed(names)}; "
            "the model was not trained on what happens there"
        )
        if self._action == "stop":
            raise UncertaintyError(message)
        warnings.warn(message, UncertaintyWarning, stacklevel=2)

    def deviations(self, state: openmm.State) -> np.ndarray:
        """Standard deviation over the members of the force on each atom.

        Parameters
        ----------
        state : openmm.State
            With positions, and the box where there is one.

        Returns
        -------
        ndarray
            ``(n_atoms,)`` kJ/mol/nm, in the order of `atoms`.
        """
        x = torch.tensor(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)[self._atoms], dtype=torch.float64)
        box = torch.tensor(state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(unit.nanometer), dtype=torch.float64) if self._periodic else None
        deviations = np.zeros(len(x))
        for group in self._groups:
            deviations[group] = self._model.deviations(x[group], self._numbers[group], box).cpu().numpy()
        return deviations


def _require_caps(topology: app.Topology, atoms: set[int]) -> None:
    """Without the hydrogens that openmm-ml puts on cut bonds, the atoms at their ends would pass for radicals."""
    bonds = [(bond.atom1.index, bond.atom2.index) for bond in topology.bonds()]
    cut = [pair for pair in bonds if (pair[0] in atoms) != (pair[1] in atoms)]
    caps = atoms - {atom for pair in bonds for atom in pair}
    if len(cut) > len(caps):
        raise UnsupportedSystemError(
            f"{len(cut)} bonds lead from atoms to others, the first that of {cut[0][0]} and {cut[0][1]}, and the hydrogens that cap them in a mixed "
            "System are not among atoms; give the topology of createMixedSystem(..., returnInfo=True) and add the indices of its last atoms"
        )
