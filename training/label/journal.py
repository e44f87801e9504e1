"""The journal of a labelling run: one SQLite file, in which a frame is either there in full or not at all, whatever kills the process."""

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from training.label.errors import LabelError

_SCHEMA = """
CREATE TABLE settings (json TEXT);
CREATE TABLE tasks (task TEXT PRIMARY KEY, n_frames INTEGER, note TEXT);
CREATE TABLE frames (
    id INTEGER PRIMARY KEY, molecule TEXT, source TEXT, numbers BLOB, positions BLOB,
    disagreement REAL, chosen INTEGER DEFAULT 1, energy REAL, forces BLOB, failure TEXT
);
"""


@dataclass
class Candidate:
    """A geometry that may be labelled.

    Attributes
    ----------
    molecule : str
        What it is a geometry of.
    source : str
        How it was made.
    atoms : ase.Atoms
        Without calculator.
    """

    molecule: str
    source: str
    atoms: Atoms


@dataclass
class LabelledFrame:
    """A candidate with its labels: total energy in eV, forces ``(n_atoms, 3)`` in eV/Angstrom, and the disagreement where it was measured."""

    candidate: Candidate
    energy: float
    forces: np.ndarray
    disagreement: float | None


class Journal:
    """Tasks sampled, candidates, and labels so far.

    Parameters
    ----------
    path : Path
        The SQLite file.
    settings : dict
        Everything that decides what the frames are; plain data.
    resume : bool
        Whether to continue an existing journal.

    Raises
    ------
    LabelError
        If there is a journal and `resume` is False, or none and it is True; if its settings differ; if it is damaged, in use or cannot be made.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool) -> None:
        if path.exists() != resume:
            if resume:
                raise LabelError(f"{path} does not exist: there is no run to resume; start without --resume")
            raise LabelError(f"{path} holds an unfinished run; continue it with --resume, or remove the file to start anew")
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, timeout=1.0)
        except (OSError, sqlite3.Error) as error:
            raise LabelError(f"{path}: cannot be opened ({error}); the output must be in a directory that can be written, give another") from None
        try:
            # One writer: a second process would label every frame again.
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("BEGIN EXCLUSIVE")
            if not resume or not self._db.execute("SELECT name FROM sqlite_master WHERE name = 'settings'").fetchone():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO settings VALUES (?)", (json.dumps(settings),))
            own = json.loads(self._db.execute("SELECT json FROM settings").fetchone()[0])
            self._db.execute("COMMIT")
        except (sqlite3.DatabaseError, TypeError) as error:
            self._db.close()
            raise LabelError(f"{path}: cannot be used ({error}); another run may be using it, or it is damaged") from None
        settings = json.loads(json.dumps(settings))
        different = sorted(k for k in own.keys() | settings.keys() if own.get(k) != settings.get(k))
        if different:
            self._db.close()
            shown = "; ".join(f"{k} was {own.get(k)!r}, now {settings.get(k)!r}" for k in different)
            raise LabelError(f"{path} belongs to a run with other settings ({shown}); resume with those, or write to another output")

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def sampled(self) -> set[str]:
        """Tasks whose candidates are in the journal."""
        return {task for (task,) in self._db.execute("SELECT task FROM tasks")}

    def add_task(self, task: str, candidates: list[Candidate], note: str | None) -> None:
        """Store all candidates of a task, and that it is done, in one transaction."""
        self._db.execute("BEGIN")
        self._db.execute("INSERT INTO tasks VALUES (?, ?, ?)", (task, len(candidates), note))
        for c in candidates:
            numbers, positions = c.atoms.numbers.astype(np.uint8).tobytes(), c.atoms.positions.astype(np.float64).tobytes()
            values = (c.molecule, c.source, numbers, positions)
            self._db.execute("INSERT INTO frames (molecule, source, numbers, positions) VALUES (?, ?, ?, ?)", values)
        self._db.execute("COMMIT")

    def notes(self) -> list[str]:
        """What went wrong while sampling."""
        return [note for (note,) in self._db.execute("SELECT note FROM tasks WHERE note IS NOT NULL ORDER BY rowid")]

    def count(self, condition: str) -> int:
        """Number of frames with this SQL `condition`."""
        return int(self._db.execute(f"SELECT COUNT(*) FROM frames WHERE {condition}").fetchone()[0])

    def molecules(self) -> int:
        """Number of molecules and pairs of which there are frames to be labelled."""
        return int(self._db.execute("SELECT COUNT(DISTINCT molecule) FROM frames WHERE chosen").fetchone()[0])

    def _frames(self, condition: str) -> Iterator[tuple[int, Candidate]]:
        ids = [i for (i,) in self._db.execute(f"SELECT id FROM frames WHERE {condition} ORDER BY id")]
        for i in ids:
            molecule, source, numbers, positions = self._db.execute(
                "SELECT molecule, source, numbers, positions FROM frames WHERE id = ?", (i,)
            ).fetchone()
            yield i, Candidate(molecule, source, Atoms(np.frombuffer(numbers, np.uint8), np.frombuffer(positions).reshape(-1, 3)))

    def without_disagreement(self) -> Iterator[tuple[int, Candidate]]:
        """Candidates that the committee has not seen, with their numbers."""
        return self._frames("disagreement IS NULL")

    def set_disagreement(self, frame: int, value: float) -> None:
        """Store what the committee said."""
        self._db.execute("UPDATE frames SET disagreement = ? WHERE id = ?", (value, frame))

    def choose(self, n_frames: int) -> None:
        """Leave only the `n_frames` with the largest disagreement to be labelled."""
        best = "SELECT id FROM frames ORDER BY disagreement DESC, id LIMIT ?"
        self._db.execute(f"UPDATE frames SET chosen = (id IN ({best}))", (n_frames,))

    def unlabelled(self) -> Iterator[tuple[int, Candidate]]:
        """Chosen candidates with neither label nor failure, with their numbers."""
        return self._frames("chosen AND energy IS NULL AND failure IS NULL")

    def set_label(self, frame: int, energy: float, forces: np.ndarray) -> None:
        """Store a label: eV, eV/Angstrom."""
        self._db.execute("UPDATE frames SET energy = ?, forces = ? WHERE id = ?", (energy, forces.astype(np.float64).tobytes(), frame))

    def set_failure(self, frame: int, reason: str) -> None:
        """Store why a frame has no label."""
        self._db.execute("UPDATE frames SET failure = ? WHERE id = ?", (reason, frame))

    def failures(self) -> dict[str, int]:
        """Reasons and how often they came."""
        return dict(self._db.execute("SELECT failure, COUNT(*) FROM frames WHERE failure IS NOT NULL GROUP BY failure"))

    def labelled(self) -> Iterator[LabelledFrame]:
        """All frames with labels."""
        for i, candidate in self._frames("energy IS NOT NULL"):
            energy, forces, disagreement = self._db.execute("SELECT energy, forces, disagreement FROM frames WHERE id = ?", (i,)).fetchone()
            yield LabelledFrame(candidate, energy, np.frombuffer(forces).reshape(-1, 3), disagreement)
