"""Memory that the process keeps instead of handing it back to the system after every step."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Let the C library keep up to 1 GiB of freed memory; returns whether it does.

    A step frees and asks again for tensors of many megabytes. By default glibc returns them to the
    system, which hands out zeroed pages one by one, and that takes time in every step. This
    concerns the whole process, so it is done for commands and never on import.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return all(mallopt(option, _BYTES) == 1 for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
