"""Files of named arrays (.npz), read with one line of complaint."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import CheckpointError


@contextmanager
def read_arrays(path: str | Path, kind: str) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of an .npz file, for as long as they are read.

    Args:
        kind: what the file should be, for the message.

    Raises:
        CheckpointError: the file is missing, damaged, or another's: what reads it misses an array.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read as {kind} ({error}); fetch or save it again") from error


def unpack_lines(packed: np.ndarray) -> list[str]:
    """Lines of text from an array of bytes."""
    return bytes(packed).decode().split("\n")
