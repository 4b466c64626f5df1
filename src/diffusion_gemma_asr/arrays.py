"""Files of named arrays (.npz): written whole or not at all, read with one line of complaint."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .errors import CheckpointError


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz file, whole or not at all."""
    part = Path(path).with_suffix(".part")
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    part.replace(path)


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


def pack_lines(lines: Sequence[str]) -> np.ndarray:
    """Lines of text as an array of bytes."""
    return np.frombuffer("\n".join(lines).encode(), dtype=np.uint8)


def unpack_lines(packed: np.ndarray) -> list[str]:
    """What `pack_lines` was given."""
    return bytes(packed).decode().split("\n")
