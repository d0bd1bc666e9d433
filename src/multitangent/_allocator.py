"""Memory that the process keeps instead of handing it back to the system after every step."""

from __future__ import annotations

import ctypes
import sys

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_BYTES = 2**30


def prime() -> None:
    """Let glibc keep twice 32 MiB of freed memory, as it does once a tensor of 32 MiB was freed.

    Its thresholds follow the largest block that was freed; no page of this one is touched.
    """
    torch.empty(2**25 - 2**12, dtype=torch.uint8)


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
