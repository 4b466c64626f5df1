"""Memory of long runs: what glibc's malloc keeps although it is free, and oneDNN although it is not used again; and what
suits which device."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
# Programs that oneDNN keeps, one for each shape of a bfloat16 or 8-bit product: 1,024 if it may, 50 MB after 49 clips,
# each of which has a length of its own. The layers of one clip share some ten.
PRIMITIVES = 32


def of_device(values: Mapping[str, T], device: torch.device) -> T:
    """Of values for "cpu" and "cuda" the one that suits a device: every accelerator is taken for a GPU."""
    return values["cpu" if device.type == "cpu" else "cuda"]


def give_back_memory() -> None:
    """Hands free memory back to the system: tensors of ever new sizes leave gaps that glibc would keep, 50 MB a pool."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def steady_memory() -> None:
    """For a process that does nothing but transcribe: large blocks always come from the system and go back to it at once.

    glibc raises its bound for that as it goes, and then an hour takes 200 MB more than ten minutes. For oneDNN to keep to
    `PRIMITIVES`, call this before the first product.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))
    libc = _libc()
    if libc is not None:
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 20)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """glibc; None on systems with another C library."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None
