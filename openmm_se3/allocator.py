"""Let the C library keep the memory that one step frees for the next, up to a bound."""

import ctypes
import os

# Numbers of parameters, of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
#: How much free memory at the end of its heap the process may hold on to.
KEPT = 2**29
#: Blocks of at least so many bytes, glibc's limit, still come from the system and go back to it.
LARGE = 2**25
#: By these a user has decided already.
_VARIABLES = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"}


def keep_freed_memory() -> bool:
    """Hold on to freed memory, where glibc by default returns the end of its heap once some 20 MB there are free.

    A conservative step of 60 atoms and more keeps what it has made of the edges until the reverse pass, some 100 MB for 200 atoms. Returned at each
    step, and asked for again, they come page by page, zeroed, which takes as long as making all of it twice would.

    Returns
    -------
    bool
        Whether it was set. It is not where an environment variable chooses the allocator or its thresholds, nor where the C library has no such
        parameters, as musl's, that of macOS and that of Windows.
    """
    if _VARIABLES & set(os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # CDLL(None) is the process itself, which Windows cannot name
        return False
    # In this order: either call ends that glibc adapts the size of large blocks, which then are those of 128 kB and more, and slow, if none is set.
    return bool(mallopt(_MMAP_THRESHOLD, LARGE)) and bool(mallopt(_TRIM_THRESHOLD, KEPT))
