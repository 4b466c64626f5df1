"""Files that are whole or not there: written beside their place, then moved into it; and files on other machines.

A place is a Path, or the address of a file on a remote file system, such as "s3://bucket/talk.mp3", which stays text: a Path
would make one slash of its two. fsspec knows the file systems.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from .errors import AsrError, first_line

Place: TypeAlias = "Path | str"

_ADDRESS = re.compile(r"(?!https?://)[a-z][a-z0-9+.:-]+://")


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
    # Numbers of processes are the same on several machines, which may share the folder.
    part = path.with_name(f".{start}.{secrets.token_hex(4)}.part")
    try:
        yield part
        if part.exists():
            part.chmod(_MODE)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Place, text: str) -> None:
    """Writes a text file, in UTF-8, so that it is never seen half-written, if a remote file system does not show it so.

    Raises:
        AsrError: it cannot be written.
    """
    if is_remote(path):
        _put(str(path), text.encode())
        return
    try:
        with whole_file(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AsrError(f"{path}: cannot be written ({error.strerror}); choose another folder, or free some space") from None


def is_remote(place: object) -> bool:
    """Whether it is the address of a file on a remote file system; those of web pages are none."""
    return isinstance(place, str) and _ADDRESS.match(place) is not None


def place_of(name: str) -> Place:
    """Where a file is, by what users call it: a path, or an address, of which "file://" means a path as well."""
    name = name.removeprefix("file://")
    return name if is_remote(name) else Path(name)


def stem_of(place: Place) -> str:
    """The name of a file without folder and ending; of one inside another ("zip://a.wav::s3://b/c.zip") the inner one's."""
    if isinstance(place, Path):
        return place.stem
    inner = next(part for part in place.split("::") if "://" in part)
    return PurePosixPath(inner.split("://", 1)[1]).stem


def folder_of(place: Place) -> str:
    """The folder of a file as an absolute path; that of a remote one begins with its protocol: "/s3:/bucket/calls"."""
    if isinstance(place, Path):
        return os.path.dirname(os.path.abspath(place))
    inner = next(part for part in place.split("::") if "://" in part)
    protocol, _, path = inner.partition("://")
    return os.path.dirname(f"/{protocol}:/{path}")


def file_system(address: str) -> tuple[Any, str]:
    """The fsspec file system of a remote address, and the path there.

    Raises:
        AsrError: fsspec, or the package that it needs for this protocol, is not installed, or there is no such protocol.
    """
    try:
        import fsspec
    except ImportError:
        raise AsrError(f"{address}: needs the extra [remote]: pip install 'diffusion-gemma-asr[remote]'") from None
    try:
        system, path = fsspec.url_to_fs(address)
    except ImportError as error:
        raise AsrError(f"{address}: its protocol needs another package ({first_line(error)})") from None
    except Exception as error:  # every file system raises its own
        raise AsrError(f"{address}: cannot be reached ({first_line(error)})") from error
    return system, path


def exists(place: Place) -> bool:
    """Whether there is such a file."""
    if isinstance(place, Path):
        return os.path.exists(place)
    system, path = file_system(place)
    return bool(system.exists(path))


def names_in(folder: str) -> set[str]:
    """The names of all files in a remote folder; none where there is no such folder.

    Raises:
        AsrError: it cannot be read.
    """
    system, path = file_system(folder)
    try:
        system.invalidate_cache()  # others may have written there
        return {PurePosixPath(name).name for name in system.ls(path, detail=False)}
    except FileNotFoundError:
        return set()
    except Exception as error:  # every file system raises its own
        raise AsrError(f"{folder}: cannot be read ({first_line(error)})") from error


def _put(address: str, content: bytes) -> None:
    """Writes a remote file, and its folder where the file system wants one."""
    system, path = file_system(address)
    try:
        try:
            system.pipe_file(path, content)
        except FileNotFoundError:
            system.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
            system.pipe_file(path, content)
    except Exception as error:  # every file system raises its own
        raise AsrError(f"{address}: cannot be written ({first_line(error)})") from error
