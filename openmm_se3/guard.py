"""`DomainGuard`: stop a simulation that has left what any model can describe, and say which atoms it is."""

from collections.abc import Iterable

import numpy as np
import openmm
from openmm import app, unit

from openmm_se3.atom_names import atom_names, listed
from openmm_se3.checks import atom_indices
from openmm_se3.errors import UnsupportedSystemError
from openmm_se3.structures import close_pairs

#: No atom of a run diffuses so far; one that is there was thrown.
FARTHEST_NM = 1e6


class DomainError(openmm.OpenMMException):
    """Atoms are too close, or coordinates or forces are not finite; the message names the atoms."""


class DomainGuard:
    """Reporter that stops a simulation whose atoms fuse or whose numbers are not finite.

    It looks only every `reportInterval` steps, so it costs no more than writing a frame. Atoms of unknown elements never get this
    far: the System cannot be made.

    Parameters
    ----------
    topology : openmm.app.Topology
        Names the atoms in messages; in `check`, without a `Simulation`, periodic if it has a box.
    reportInterval : int
        Steps between checks.
    closest : float
        Distance (nm) below which two atoms count as fused. The default is half the shortest bond there is, that of H2.
    atoms : iterable of int, optional
        Look at these only, such as the ML atoms of a mixed System, whose massless sites may lie on top of each other; all by default.

    Raises
    ------
    ValueError
        If `reportInterval` or `closest` is not positive.
    TypeError
        If `atoms` holds what is no index, such as the bools of a mask.
    UnsupportedSystemError
        If an index in `atoms` is none of the topology or repeated, or there are none.

    Examples
    --------
    >>> simulation.reporters.append(DomainGuard(topology, 100))  # doctest: +SKIP
    """

    def __init__(self, topology: app.Topology, reportInterval: int, closest: float = 0.037, atoms: Iterable[int] | None = None) -> None:
        if reportInterval <= 0 or closest <= 0:
            raise ValueError(f"reportInterval and closest must be positive, got {reportInterval} and {closest}")
        self._interval, self._closest = reportInterval, closest
        n_atoms = topology.getNumAtoms()
        self._atoms = np.array(range(n_atoms) if atoms is None else atom_indices(atoms, n_atoms), dtype=int)
        if not len(self._atoms):
            raise UnsupportedSystemError("no atoms to look at: the topology or atoms is empty")
        self._names = atom_names(topology, self._atoms)
        self._periodic = topology.getPeriodicBoxVectors() is not None
        self._last = ""

    def describeNextReport(self, simulation: app.Simulation) -> dict:
        """Called by `Simulation`."""
        steps = self._interval - simulation.currentStep % self._interval
        return {"steps": steps, "periodic": None, "include": ["positions", "forces"]}

    def report(self, simulation: app.Simulation, state: openmm.State) -> None:
        """Called by `Simulation`; errors as `check`."""
        self._periodic = simulation.system.usesPeriodicBoundaryConditions()
        self.check(state, simulation.currentStep)

    def check(self, state: openmm.State, step: int) -> None:
        """Look at one State.

        Parameters
        ----------
        state : openmm.State
            With positions and forces, and the box where there is one.
        step : int
            For the message.

        Raises
        ------
        DomainError
            Naming the atoms, and what the last good State looked like.
        """
        x = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)[self._atoms]
        forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)[self._atoms]
        for values, what in ((x, "coordinates"), (forces, "forces")):
            bad = np.flatnonzero(~np.isfinite(values).all(1))
            if len(bad):
                raise DomainError(f"step {step}: {listed([self._names[i] for i in bad])} have {what} that are not finite{self.last_good()}")
        far = np.flatnonzero((np.abs(x) > FARTHEST_NM).any(1))
        if len(far):
            raise DomainError(f"step {step}: {listed([self._names[i] for i in far])} flew off, beyond {FARTHEST_NM:.0e} nm{self.last_good()}")
        box = state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(unit.nanometer) if self._periodic else None
        pairs, distances = close_pairs(x, box, self._closest)
        if len(pairs):
            i, j = pairs[0]
            raise DomainError(
                f"step {step}: atoms {self._names[i]} and {self._names[j]} are {10 * distances[0]:.3f} Angstrom apart, and {len(pairs)} pairs are "
                f"closer than {10 * self._closest:.2f}: they have fused, as no model was trained to describe{self.last_good()}"
            )
        largest = int(np.argmax((forces**2).sum(1)))
        self._last = f"at step {step} the largest force was {np.linalg.norm(forces[largest]):.3g} kJ/mol/nm, on atom {self._names[largest]}"

    def last_good(self) -> str:
        """What the last State that passed looked like, in parentheses, for an error message; empty before the first."""
        return f" ({self._last})" if self._last else ""
