"""Memory of long runs: what glibc's malloc keeps although it is free."""

from __future__ import annotations

import ctypes
import functools
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def give_back_memory() -> None:
    """Hands free memory back to the system: tensors of ever new sizes leave gaps that glibc would keep, 50 MB a pool."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def steady_memory() -> None:
    """For a process that does nothing but transcribe: large blocks always come from the system and go back to it at once.

    glibc raises its bound for that as it goes, and then an hour takes 200 MB more than ten minutes.
    """
    libc = _libc()
    if libc is not None:
        libc.mallopt(M_MMAP_THRESHOLD, 4 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 20)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """glibc; None on systems with another C library."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None
