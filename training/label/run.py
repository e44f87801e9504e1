"""`label`: structures in, an HDF5 file of labelled frames out; every step resumable."""

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ase
import numpy as np
import rdkit
from ase import Atoms
from ase.calculators.calculator import Calculator

from openmm_se3 import __version__
from training.label.calculators import calculator_factory
from training.label.dimers import random_dimer
from training.label.disagreement import Committee
from training.label.displacements import displaced_frames
from training.label.dynamics import langevin_frames
from training.label.errors import LabelError, NotTrustedError
from training.label.hold_out import HeldOut
from training.label.journal import Candidate, Journal
from training.label.layout import write_ani1x
from training.label.scans import bent_frames, stretched_frames, turned_frames
from training.label.structures import Molecule, geometries, is_plausible, read_molecules
from training.units import KCAL_PER_MOL_PER_EV

MAX_FAILURES_IN_A_ROW = 20
#: Labels that failed in a row are of so many molecules at least where the calculator itself is to blame, and not what it cannot do.
MOLECULES_OF_FAILURES = 5

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LabelSettings:
    """What decides which frames come out and what their labels are.

    Attributes
    ----------
    calculator, options
        What labels; see `training.label.calculators.calculator_factory`.
    sampler, sampler_options
        What drives the dynamics; by default what labels.
    conformers : int
        Conformers of each SMILES.
    temperatures : tuple of float
        K, of dynamics, displacements and scans.
    frames, displacements, stretches, torsions, bends : int
        Frames of dynamics, of displacements, and of displacements with a stretched bond, a turned torsion or a bent angle (see
        `training.label.scans`), for each conformer and temperature.
    hold_out : tuple of str
        Data whose formulas are left out, also in pairs and clusters, so that they can still be tested on: of a file all formulas, of a packed
        data set those that its split does not give to training.
    dimers : int
        Random pairs of the molecules, in all.
    contacts : tuple of float
        Closest contacts of the pairs, from the least to the largest, Angstrom; by default from the repulsive wall to where only the tails
        of attraction are left.
    committee : tuple of str
        Exported models whose disagreement decides what is labelled.
    select : int or None
        How many candidates are labelled: those on which the committee disagrees most.
    max_force : float
        Labels with a larger force on an atom are left out, kcal/mol/Angstrom. No simulation goes beyond the default, and squared errors of such
        frames would drown all others; a repulsive wall, learned by a robust loss, needs more.
    seed : int
        Of everything random.
    """

    calculator: str
    options: dict[str, Any] = field(default_factory=dict)
    sampler: str | None = None
    sampler_options: dict[str, Any] = field(default_factory=dict)
    conformers: int = 2
    temperatures: tuple[float, ...] = (300.0, 600.0)
    frames: int = 4
    displacements: int = 4
    stretches: int = 0
    torsions: int = 0
    bends: int = 0
    hold_out: tuple[str, ...] = ()
    dimers: int = 0
    contacts: tuple[float, float] = (1.6, 4.0)
    committee: tuple[str, ...] = ()
    select: int | None = None
    max_force: float = 400.0
    seed: int = 0

    def __post_init__(self) -> None:
        sampled = ("frames", "displacements", "stretches", "torsions", "bends")
        for name in ("conformers", *sampled, "dimers", "seed"):
            least = 1 if name == "conformers" else 0
            if getattr(self, name) < least:
                raise LabelError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.seed >= 2**31:
            raise LabelError(f"seed must be less than 2**31, RDKit's limit, got {self.seed}")
        hot = bool(self.temperatures) and all(0 < t < np.inf for t in self.temperatures)
        if any(getattr(self, name) for name in sampled) and not hot:
            raise LabelError(f"temperatures must be positive (K) and at least one, got {list(self.temperatures)}")
        if not 0 < self.contacts[0] <= self.contacts[1] < np.inf:
            raise LabelError(f"contacts must be two positive distances (Angstrom), the smaller one first, got {list(self.contacts)}")
        if self.sampler is None and self.sampler_options:
            raise LabelError("options for a sampler were given, but no sampler")
        if bool(self.committee) != (self.select is not None):
            raise LabelError("a committee and the number of frames to select belong together; give both or neither")
        if self.select is not None and self.select < 1:
            raise LabelError(f"select must be at least 1, got {self.select}")
        if not 0 < self.max_force < np.inf:
            raise LabelError(f"max_force must be a positive number of kcal/mol/Angstrom, got {self.max_force}")


def label(
    inputs: list[str],
    output: Path,
    settings: LabelSettings,
    level_of_theory: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make training data.

    Parameters
    ----------
    inputs : list of str
        SMILES, ``.smi`` files, structure files.
    output : Path
        HDF5 file to make, in the layout of the ANI-1x release. Until it is whole, everything is in ``OUTPUT.journal``.
    settings : LabelSettings
        What to make.
    level_of_theory : str, optional
        What the labels are, for those who read the file; by default the calculator and its options.
    resume : bool
        Continue the run that left ``OUTPUT.journal``; with the same settings, the result has the frames of an uninterrupted run.
    progress : callable, optional
        Called with the stage (``sampling``, ``committee``, ``labelling``), the number done and that of all.

    Returns
    -------
    dict
        ``candidates``, ``labelled``, ``failures`` by reason, ``notes`` on what could not be sampled.

    Raises
    ------
    LabelError
        For unusable input, calculators, committee or journal, and if the calculator keeps failing; what was labelled is kept.
    DataError
        If what is to be held out cannot be read.
    ModelFileError
        If a model of the committee cannot be opened.
    FileExistsError
        If `output` exists.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists already; choose another output or remove it")
    tell = progress or (lambda stage, done, total: None)
    make_label = calculator_factory(settings.calculator, settings.options)
    make_sampler = make_label if settings.sampler is None else calculator_factory(settings.sampler, settings.sampler_options)
    molecules = read_molecules(inputs)
    committee = Committee(list(settings.committee)) if settings.committee else None
    if committee is not None:
        committee.require_elements(set().union(*(m.symbols for m in molecules)))
    plain = {**asdict(settings), "inputs": inputs, "input_sha256": [_sha256(text) for text in inputs]}
    held_out = HeldOut(settings.hold_out)
    journal = Journal(output.with_name(output.name + ".journal"), plain, resume)
    try:
        _sample(journal, molecules, settings, make_sampler, held_out, tell)
        if committee is not None:
            assert settings.select is not None
            _choose(journal, committee, settings.select, tell)
        _label(journal, make_label, settings.max_force, tell)
        report = {
            "candidates": journal.count("1"),
            "labelled": journal.count("energy IS NOT NULL"),
            "failures": journal.failures(),
            "notes": journal.notes(),
        }
        if not report["labelled"]:
            raise LabelError(f"no frame was labelled: {report['failures'] or report['notes'] or 'there was no candidate'}")
        write_ani1x(output, journal.labelled(), _provenance(plain, level_of_theory), committee is not None)
    except sqlite3.Error as error:
        raise LabelError(f"{journal.path}: {error}; what it holds is kept: free some space if the disk is full, and go on with --resume") from error
    finally:
        journal.close()
    journal.path.unlink()
    return report


def _sha256(text: str) -> str | None:
    return hashlib.sha256(Path(text).read_bytes()).hexdigest() if os.path.isfile(text) else None


def _provenance(settings: dict[str, Any], level_of_theory: str | None) -> dict[str, str]:
    described = f"{settings['calculator']} {json.dumps(settings['options'])}" if settings["options"] else settings["calculator"]
    return {
        "level_of_theory": level_of_theory or described,
        "settings": json.dumps(settings),
        "software": f"openmm-se3 {__version__} (python -m training label), ASE {ase.__version__}, RDKit {rdkit.__version__}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _sample(
    journal: Journal,
    molecules: list[Molecule],
    settings: LabelSettings,
    make_sampler: Callable[[], Calculator],
    held_out: HeldOut,
    tell: Progress,
) -> None:
    """Fill the journal with candidates, one task at a time; each task has random numbers of its own, so that the order of runs does not matter."""
    done = journal.sampled()
    total = len(molecules) + settings.dimers
    failed_in_a_row = 0
    for i in range(total):
        is_dimer = i >= len(molecules)
        task = f"dimer {i - len(molecules)}" if is_dimer else f"molecule {i}"
        if task not in done:
            rng = np.random.default_rng([settings.seed, i])
            if is_dimer:
                candidates, note, failed = *_dimer(molecules, settings, held_out, rng), False
            else:
                candidates, note, failed = _of_molecule(molecules[i], settings, make_sampler, rng)
            failed_in_a_row = failed_in_a_row + 1 if failed else 0
            if failed_in_a_row == MAX_FAILURES_IN_A_ROW:
                raise LabelError(
                    f"the dynamics of {failed_in_a_row} molecules in a row failed, lastly: {note}; is the sampler made for such molecules?"
                )
            if candidates and candidates[0].atoms in held_out:
                candidates, note = [], f"{candidates[0].molecule}: its formula is held out, or that of a molecule in it"
            journal.add_task(task, candidates, note)
        tell("sampling", i + 1, total)


def _of_molecule(
    molecule: Molecule, settings: LabelSettings, make_sampler: Callable[[], Calculator], rng: np.random.Generator
) -> tuple[list[Candidate], str | None, bool]:
    """Candidates of one molecule, a note if something is missing, and whether the sampler failed."""
    starts = geometries(molecule, settings.conformers, settings.seed)
    candidates = [Candidate(molecule.name, "conformer" if molecule.smiles else "input", atoms) for atoms in starts]
    note = None if starts else _no_geometry(molecule)
    failed = False
    for atoms in starts:
        for temperature in settings.temperatures:
            for kind, sampled, n_frames in (
                ("displacement", displaced_frames, settings.displacements),
                ("stretch", stretched_frames, settings.stretches),
                ("torsion", turned_frames, settings.torsions),
                ("bend", bent_frames, settings.bends),
            ):
                frames = sampled(atoms, temperature, n_frames, rng)
                candidates += [Candidate(molecule.name, f"{kind} {temperature:g} K", frame) for frame in frames]
            if not settings.frames or failed:
                continue
            try:
                frames = langevin_frames(atoms, make_sampler(), temperature, settings.frames, rng)
            except Exception as error:  # whatever somebody's calculator raises: one molecule is lost, not the run
                note, failed = f"{molecule.name}: dynamics failed ({type(error).__name__}: {error})", True
                continue
            candidates += [Candidate(molecule.name, f"dynamics {temperature:g} K", frame) for frame in frames]
    return candidates, note, failed


def _no_geometry(molecule: Molecule) -> str:
    if "." in (molecule.smiles or ""):
        return f"{molecule.name}: RDKit found no geometry of several fragments; give them as separate molecules, which dimers (--dimers) pair"
    return f"{molecule.name}: RDKit found no geometry"


def _dimer(molecules: list[Molecule], settings: LabelSettings, held_out: HeldOut, rng: np.random.Generator) -> tuple[list[Candidate], str | None]:
    pair = [molecules[i] for i in rng.integers(len(molecules), size=2)]
    choices = [geometries(m, settings.conformers, settings.seed) for m in pair]
    name = " + ".join(m.name for m in pair)
    if not all(choices):
        return [], f"{name}: {_no_geometry(pair[0] if not choices[0] else pair[1])}"
    first, second = (c[rng.integers(len(c))] for c in choices)
    if first in held_out or second in held_out:  # a molecule in a pair is trained on as well
        return [], f"{name}: the formula of one of them is held out"
    atoms = random_dimer(first, second, settings.contacts, rng)
    return ([Candidate(name, "dimer", atoms)], None) if is_plausible(atoms) else ([], f"{name}: the two collide")


def _choose(journal: Journal, committee: Committee, n_frames: int, tell: Progress) -> None:
    total = journal.count("1")
    done = total - journal.count("disagreement IS NULL")
    for frame, candidate in journal.without_disagreement():
        journal.set_disagreement(frame, committee.disagreement(candidate.atoms))
        done += 1
        tell("committee", done, total)
    journal.choose(n_frames)


def _label(journal: Journal, make_calculator: Callable[[], Calculator], max_force: float, tell: Progress) -> None:
    """Label what is chosen and not yet labelled."""
    total = journal.count("chosen")
    done = total - journal.count("chosen AND energy IS NULL AND failure IS NULL")
    tell("labelling", done, total)
    failures: list[tuple[int, str]] = []  # kept back: if the calculator never comes back, a resumed run must try these again
    of_molecules: set[str] = set()
    calculator, numbers = make_calculator(), None
    enough = min(MOLECULES_OF_FAILURES, journal.molecules())
    for frame, candidate in journal.unlabelled():
        atoms = candidate.atoms
        if numbers is None or not np.array_equal(numbers, atoms.numbers):
            # A calculator may carry a density or a topology over; that of another molecule would be wrong.
            calculator, numbers = make_calculator(), atoms.numbers
        try:
            energy, forces = _evaluate(atoms, calculator)
        except NotTrustedError as error:
            journal.set_failure(frame, str(error))
        except Exception as error:  # whatever somebody's calculator raises
            failures.append((frame, f"{type(error).__name__}: {error}"))
            of_molecules.add(candidate.molecule)
            if len(failures) >= MAX_FAILURES_IN_A_ROW and len(of_molecules) >= enough:
                raise LabelError(
                    f"{len(failures)} labels in a row failed, lastly for {candidate.molecule}: {failures[-1][1]}. "
                    "What was labelled is kept: mend the calculator's installation and go on with --resume"
                ) from error
            calculator = make_calculator()
        else:
            for failed, reason in failures:
                journal.set_failure(failed, reason)
            failures.clear()
            of_molecules.clear()
            if np.linalg.norm(forces, axis=1).max() * KCAL_PER_MOL_PER_EV > max_force:
                journal.set_failure(frame, f"a force above {max_force:g} kcal/mol/Angstrom")
            else:
                journal.set_label(frame, energy, forces)
        done += 1
        tell("labelling", done, total)
    if failures and not journal.count("energy IS NOT NULL"):
        raise LabelError(f"no label could be computed, lastly: {failures[-1][1]}")
    for failed, reason in failures:
        journal.set_failure(failed, reason)


def _evaluate(atoms: Atoms, calculator: Calculator) -> tuple[float, np.ndarray]:
    """Energy in eV and forces ``(n_atoms, 3)`` in eV/Angstrom; a `ValueError` for what is no label."""
    atoms.calc = calculator
    energy, forces = float(atoms.get_potential_energy()), np.asarray(atoms.get_forces(), dtype=np.float64)
    if forces.shape != (len(atoms), 3) or not np.isfinite(energy) or not np.isfinite(forces).all():
        raise ValueError("the calculator gave an energy or forces that are not finite or not of the right shape")
    return energy, forces
