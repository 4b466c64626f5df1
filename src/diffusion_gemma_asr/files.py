"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import AsrError


def _umask() -> int:
    """What new files of this process must not allow; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_MODE = 0o666 & ~_umask()  # of new files; some libraries write for the owner alone


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` when the block ends, and vanishes where the block fails.

    Args:
        path: the file that is wanted; its folder exists.

    Yields:
        a path in the same folder that no other process uses.
    """
    path = Path(path)
    start = os.fsdecode(os.fsencode(path.name)[:200])  # a name may have 255 bytes
    part = path.with_name(f".{start}.{os.getpid()}.part")
    try:
        yield part
        if part.exists():
            part.chmod(_MODE)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Writes a text file, in UTF-8, so that it is never seen half-written.

    Raises:
        AsrError: it cannot be written.
    """
    try:
        with whole_file(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AsrError(f"{path}: cannot be written ({error.strerror}); choose another folder, or free some space") from None
