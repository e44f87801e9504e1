"""Files that are whole at every instant."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

#: Beginning of the names of files that are being written; their ends are kept, by which programs tell formats.
PARTIAL = "partial-"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write, which takes its place at the end: a kill leaves the old one or the new one, an error the old one.

    Parameters
    ----------
    path : Path
        File to make, in a directory that exists.
    """
    partial = path.with_name(PARTIAL + path.name)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
