"""Folders in the format Shar of the library lhotse: shards of cuts, each beside a tar file with their sounds.

cuts.000000.jsonl.gz, recording.000000.tar, cuts.000001.jsonl.gz, ...

lhotse itself reads a shard from beginning to end. Here each sound is read where it lies, like those of other sources, and
has a path of its own, TAR/CUT, as if the tar file were a folder. Neither needs lhotse.
"""

from __future__ import annotations

import gzip
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..errors import AudioError, DataError
from .manifest import Lines

CUTS = re.compile(r"cuts\.\d+\.jsonl(\.gz)?")
NO_DATA = {".json", ".nometa", ".nodata"}  # endings of files in a tar file that hold no sound


class _Span(NamedTuple):
    start: int  # bytes
    size: int


def is_shar(folder: Path) -> bool:
    """Whether a folder holds shards of cuts."""
    return any(CUTS.fullmatch(file.name) for file in folder.iterdir())


def cuts_of(folder: Path, language: str) -> Iterator[Lines]:
    """The cuts of a folder's shards, in order.

    Args:
        folder: see `is_shar`.
        language: of cuts that name none.

    Raises:
        DataError: a tar file is missing, or a file of cuts cannot be read.
    """
    for file in sorted(file for file in folder.iterdir() if CUTS.fullmatch(file.name)):
        tar = file.with_name(file.name.split(".jsonl")[0].replace("cuts", "recording", 1) + ".tar")
        if not tar.is_file():
            raise DataError(f"{file}: no {tar.name} beside it; a shard needs the sounds of its cuts")
        try:
            content = file.read_bytes()
            text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError(f"{file}: cannot be read ({error})") from None
        yield Lines(file, text.split("\n"), tar, "shar", language)


def tar_of(path: str) -> str | None:
    """The tar file in which the sound with a path TAR/CUT lies; None for any other path."""
    start, found, _ = path.partition(".tar/")
    tar = start + found[:-1]
    return tar if found and os.path.isfile(tar) else None


def read_from(tar: str, path: str) -> bytes:
    """The encoded sound of a cut.

    Args:
        tar: see `tar_of`.
        path: TAR/CUT.

    Raises:
        AudioError: the tar file cannot be read, or has no such sound.
    """
    try:
        span = _spans(tar).get(path)
        if span is None:
            raise AudioError(f"{path}: the tar file has no sound of this name; write the shard anew")
        with open(tar, "rb") as file:
            file.seek(span.start)
            content = file.read(span.size)
    except (OSError, tarfile.TarError) as error:
        raise AudioError(f"{tar}: cannot be read ({error})") from None
    if len(content) < span.size:
        raise AudioError(f"{tar}: cut short; {path} lies behind its end")
    return content


@cache
def _spans(tar: str) -> dict[str, _Span]:
    """Where the sounds lie in a tar file, by the paths of their cuts."""
    with tarfile.open(tar, "r:") as members:
        sounds = [member for member in members if member.isfile() and os.path.splitext(member.name)[1] not in NO_DATA]
    names = [os.path.splitext(sound.name)[0] for sound in sounds]  # those of the cuts
    places = [_Span(sound.offset_data, sound.size) for sound in sounds]
    return dict(zip((os.path.abspath(os.path.join(tar, f"./{name}")) for name in names), places, strict=True))
