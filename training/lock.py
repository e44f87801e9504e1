"""A lock on a directory, of one process at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"


@contextlib.contextmanager
def alone(directory: Path, otherwise: str) -> Iterator[None]:
    """Keep every other process out of a directory, until this one ends, however it does.

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
    OSError
        If the lock cannot be written.
    """
    try:
        held = FileLock(directory / LOCK).acquire(timeout=0)
    except Timeout:
        raise FileExistsError(f"{otherwise}; wait for its end, or choose another output directory") from None
    with held:
        yield
