"""A lock on a directory, of one process at a time."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"


@contextlib.contextmanager
def alone(directory: Path, otherwise: str) -> Iterator[None]:
    """Keep every other process out of a directory, until this one ends, however it does: the lock is SQLite's, as that of `label`.

    Parameters
    ----------
    directory : Path
        It must exist; the lock is a file in it.
    otherwise : str
        What to say where another process holds the lock.

    Raises
    ------
    FileExistsError
        If another process does.
    """
    lock = sqlite3.connect(directory / LOCK, isolation_level=None, timeout=0.0)
    try:
        try:
            lock.execute("PRAGMA journal_mode = MEMORY")  # no second file
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise FileExistsError(f"{otherwise} ({error}); wait for its end, or choose another output directory") from None
        yield
    finally:
        lock.close()
