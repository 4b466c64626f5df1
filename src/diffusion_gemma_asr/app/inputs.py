"""Which recordings a command takes: named one by one, by patterns, by a list; all of them, or one part of n."""

from __future__ import annotations

import codecs
import glob
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from ..data.manifest import read_sounds
from ..errors import AsrError, DataError, first_line
from ..files import Place, file_system, is_remote, place_of
from ..strict import option

_T = TypeVar("_T")

STDIN = Path("-")


@dataclass(frozen=True)
class Recording:
    """A recording, or a part of one.

    Attributes:
        file: where it is; STDIN is standard input.
        offset: where the part begins, in seconds.
        duration: of the part, in seconds; None: to the end.
    """

    file: Place
    offset: float = 0.0
    duration: float | None = None


@dataclass(frozen=True)
class InputOptions:
    """Where sound comes from, and how much of it this process takes. Raises AsrError on impossible values."""

    microphone: bool = option(False, "Live, from the default input device, until Ctrl-C.")
    every: float = option(1.0, "Seconds of sound between updates of the text from a microphone.", min=0.1)
    files_from: str | None = option(
        None, "A list of files: a path a line, or a JSONL manifest; - is standard input.", metavar="LIST"
    )
    shard: str | None = option(
        None, "Take one part of n of the files, from 1/n to n/n; every process gets the same files.", metavar="I/N"
    )

    def __post_init__(self) -> None:
        if self.shard is None:
            return
        if (found := re.fullmatch(r"(\d+)/(\d+)", self.shard)) is None:
            raise AsrError(f"shard is {self.shard!r}; give i/n, such as 3/8")
        number, count = map(int, found.groups())
        if not 1 <= number <= count:
            hint = "; it counts from 1: add 1 to a counter that begins with 0" if number == 0 else ""
            raise AsrError(f"shard is {self.shard}; it must be from 1/{count or 'n'} to {count or 'n'}/{count or 'n'}{hint}")

    def part(self, items: Sequence[_T]) -> list[_T]:
        """What this process takes of all items: every n-th, from the i-th on."""
        if self.shard is None:
            return list(items)
        number, count = map(int, self.shard.split("/"))
        return list(items[number - 1 :: count])


def recordings(names: Sequence[str], options: InputOptions) -> list[Recording]:
    """All recordings that are named, in order, whichever of them this process takes.

    Args:
        names: paths and remote addresses, patterns such as "*.mp3" that the shell has not replaced, and "-".
        options: with a list of more.

    Raises:
        AsrError: the list cannot be read or names nothing, or standard input is to be two things at once.
    """
    found = [Recording(place) for name in names for place in _matches(name)]
    if found.count(Recording(STDIN)) > 1:
        raise AsrError("standard input is named twice, and can be read once; leave out one '-'")
    if options.files_from is None:
        return found
    if options.files_from == "-" and "-" in names:
        raise AsrError("standard input cannot be both a recording and the list of them; leave out one '-'")
    listed = _listed(options.files_from)
    if not listed:
        raise AsrError(f"{options.files_from}: names no files")
    if any(item.file == STDIN for item in listed):
        raise AsrError(f"{options.files_from}: '-' in a list is no file; name standard input on the command line")
    return found + listed


def _matches(name: str) -> list[Place]:
    """The files that a pattern means, by their names' order; the name itself where it is none, or nothing is like it."""
    place = place_of(name)
    if not glob.has_magic(name) or (isinstance(place, Path) and os.path.lexists(place)):
        return [place]
    if isinstance(place, Path):
        return [Path(match) for match in sorted(glob.glob(str(place), recursive=True))] or [place]
    system, path = file_system(place)
    try:
        return sorted(map(system.unstrip_protocol, system.glob(path))) or [place]
    except Exception as error:  # every file system raises its own
        raise AsrError(f"{name}: cannot be looked through ({first_line(error)})") from error


def _listed(source: str) -> list[Recording]:
    """What a list names.

    A path a line, relative to the working directory; or, where a byte 0 is among them, one between each two of these. Empty
    lines and lines that begin with # are left out where lines are what counts. A list whose first line begins with { is a
    JSONL manifest, with paths relative to its folder.
    """
    content = _content(source)
    if content.lstrip().startswith(b"{"):
        try:
            sounds = read_sounds(content.decode(), source)
        except UnicodeDecodeError as error:
            raise DataError(f"{source}: not UTF-8 ({error.reason} at byte {error.start})") from None
        return [Recording(_beside(source, sound.audio_filepath), sound.offset, sound.duration) for sound in sounds]
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{source}: is UTF-16; save the list as UTF-8")
    if b"\0\0" in content:  # no name is empty
        raise DataError(f"{source}: is no list of files, but binary; name sound files without --files_from")
    if b"\0" in content:
        names = [name for name in content.split(b"\0") if name]
    else:
        lines = (line.removesuffix(b"\r") for line in content.split(b"\n"))
        names = [line for line in lines if line.strip() and not line.startswith(b"#")]
    return [Recording(place_of(os.fsdecode(name))) for name in names]


def _content(source: str) -> bytes:
    place = place_of(source)
    try:
        if source == "-":
            content: bytes = sys.stdin.buffer.read()
        elif isinstance(place, Path):
            content = place.read_bytes()
        else:
            system, path = file_system(place)
            content = system.cat_file(path)
    except AsrError:
        raise
    except Exception as error:  # every file system raises its own
        reason = getattr(error, "strerror", None) or first_line(error)
        raise AsrError(f"{source}: the list cannot be read ({reason})") from error
    return content.removeprefix(b"\xef\xbb\xbf")


def _beside(manifest: str, name: str) -> Place:
    """A path as a manifest means it: relative to its folder."""
    if is_remote(name) or name.startswith("file://") or manifest == "-":
        return place_of(name)
    if is_remote(manifest):
        return Path(name) if name.startswith("/") else f"{manifest.rpartition('/')[0]}/{PurePosixPath(name)}"
    return place_of(manifest).parent / name  # type: ignore[union-attr]
