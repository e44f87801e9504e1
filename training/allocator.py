"""Let the C library keep the memory that training frees, as a GPU's caching allocator does.

By default glibc gives every block of more than 32 MB, and the end of its heap, back to the system as soon as it is free. Each step of training asks
for the same hundreds of megabytes again, and the system then hands them out page by page, zeroed: up to half of the processor time of a
step (`python -m benchmarks allocator`).
"""

import ctypes
import os

# Of glibc's malloc.h: the number of a parameter, and what it is by default.
_MMAP_MAX, _DEFAULT_MMAP_MAX = -4, 65536
_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD = -1, 128 * 1024
_NEVER = -1
#: By these a user has decided already.
_VARIABLES = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"}


def keep_freed_memory(keep: bool = True) -> bool:
    """Take large blocks from the heap instead of the system, and never shrink the heap.

    The process then holds on to the most that it ever needed, which may be more than at any one moment by what lies unused between blocks.

    Parameters
    ----------
    keep : bool
        False sets what glibc has by default, and no longer adapts the size from which blocks are large.

    Returns
    -------
    bool
        Whether it was set. It is not where an environment variable sets glibc's parameters, nor where the C library has none such, as musl's,
        that of macOS and that of Windows.
    """
    if _VARIABLES & set(os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # CDLL(None) is the process itself, which Windows cannot name
        return False
    largest, threshold = (0, _NEVER) if keep else (_DEFAULT_MMAP_MAX, _DEFAULT_TRIM_THRESHOLD)
    return bool(mallopt(_MMAP_MAX, largest)) and bool(mallopt(_TRIM_THRESHOLD, threshold))
