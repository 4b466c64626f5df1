"""Where sound comes from: files, pipes, bytes and file objects, opened for PyAV."""

from __future__ import annotations

import io
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import av
from av.container import InputContainer

from ..errors import AsrError, AudioError, first_line
from ..files import file_system, place_of

File: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO"

COPY = 1 << 20  # bytes
FAR = {"probesize": str(256 << 20), "analyzeduration": "3600000000"}  # bytes, microseconds
HEAD = 64 << 20  # bytes of a pipe looked through, and kept, to find out whether it can be read as a stream
BEGINNINGS = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"fLaC", b"ID3", b"\x1a\x45\xdf\xa3", b"caff", b"#!AMR", b"FLV\x01",
              b".snd", b"\x30\x26\xb2\x75", b"wvpk", b"MAC ")  # fmt: skip
BOXES = (b"ftyp", b"styp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")  # what an mp4 file may begin with
MOVIE = (b"moov", b"moof")  # says what is in mdat


def describe(source: object) -> str:
    """What to call a source in a message: its path, the name of a file object, or what kind of thing it is."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    name = getattr(source, "name", None)
    return name if isinstance(name, str) and name and hasattr(source, "read") else f"<{type(source).__name__}>"


def unreadable(name: str, reason: object) -> AudioError:
    """The error for what is no sound, in one line."""
    told = " ".join(str(reason).split())
    return AudioError(f"{name}: cannot be read as sound ({told}); give wav, flac, mp3, m4a, ogg or the like")


@contextmanager
def open_container(source: File, name: str) -> Iterator[InputContainer]:
    """Open sound for PyAV.

    Files are read where they are, those of remote file systems ("s3://bucket/talk.mp3") block by block. What cannot be
    sought in (a FIFO, /dev/stdin, a file object such as sys.stdin.buffer) is read once, as a stream; the few formats that
    need their end before their beginning, such as an mp4 whose index comes last, go through a temporary file. A file object
    is read from where it stands if the beginning of a sound file is there, otherwise from its start, or, where that is no
    sound, from where it stands after all.

    Raises:
        AudioError: there is nothing, or nothing that FFmpeg knows; also for what FFmpeg raises inside the `with` block.
    """
    try:
        if isinstance(source, str | os.PathLike):
            place = place_of(source) if isinstance(source, str) else Path(source)
            with _open_path(place) if isinstance(place, Path) else _open_remote(place) as found:
                yield found
        elif isinstance(source, bytes | bytearray | memoryview):
            with _open_seekable(io.BytesIO(source), name) as found:
                yield found
        elif _seekable(source):
            with _open_seekable(source, name) as found:
                yield found
        else:
            with _open_stream(source, name) as found:
                yield found
    except av.error.FFmpegError as error:
        raise unreadable(name, error.strerror or error) from error
    except OSError as error:
        raise unreadable(name, error.strerror or error) from error


def _open(file: Any, options: dict[str, str] | None = None) -> InputContainer:
    return av.open(file, mode="r", metadata_errors="ignore", options=options)


def _open_again(file: Any) -> InputContainer:
    """Opens what can be opened twice: where no sound begins in the first seconds, FFmpeg has to look further.

    Some formats (flv, MPEG programs) do not say at their beginning what they hold.
    """
    found = _open(file)
    if found.streams.audio:
        return found
    found.close()
    if not isinstance(file, str):
        file.seek(0)
    return _open(file, FAR)


@contextmanager
def _open_path(path: Path) -> Iterator[InputContainer]:
    """A file by its path; absolute, so that FFmpeg cannot take "name:" at its head for a protocol."""
    if not path.exists():
        web = path.parts[:1] in (("http:",), ("https:",))
        hint = "; addresses of web pages are not read: fetch it first" if web else ""
        raise AudioError(f"{path}: no such file{hint}")
    if path.is_dir():
        raise AudioError(f"{path}: a folder, not a sound file; name the files in it")
    if not path.is_file():
        with open(path, "rb", buffering=0) as pipe, _open_stream(pipe, str(path)) as found:
            yield found
        return
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: empty file (0 bytes)")
    if _encodable(str(path.absolute())):
        with _open_again(str(path.absolute())) as found:
            yield found
    else:  # a name that is no UTF-8 text: FFmpeg does not take it
        with path.open("rb") as file, _open_seekable(file, str(path)) as found:
            yield found


@contextmanager
def _open_remote(address: str) -> Iterator[InputContainer]:
    try:
        system, path = file_system(address)
        file = system.open(path, "rb")
    except AsrError as error:
        raise AudioError(str(error)) from None
    except FileNotFoundError:
        raise AudioError(f"{address}: no such file") from None
    except Exception as error:  # every file system raises its own
        raise AudioError(f"{address}: cannot be opened ({first_line(error)})") from error
    with file, _open_seekable(file, address) as found:
        yield found


def _encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _open_seekable(file: Any, name: str) -> Iterator[InputContainer]:
    at = file.tell()
    places = [0, at] if at else [0]
    if at and _is_beginning(_Window(file, at, name).read(12)):
        places = [at]
    file.seek(0, os.SEEK_END)
    if not file.tell():
        raise unreadable(name, "empty, 0 bytes")
    for place in places:
        try:
            found = _open_again(_Window(file, place, name))
            break
        except av.error.FFmpegError:
            if place == places[-1]:
                raise
    with found:
        yield found


def _is_beginning(head: bytes) -> bool:
    """Whether the first 12 bytes are the beginning of a file, not of some packet in the middle of one."""
    ogg = head[:4] == b"OggS" and head[5:6] == b"\x02"  # the first page
    return ogg or head.startswith(BEGINNINGS) or head[4:8] == b"ftyp"


class _Window:
    """A seekable file object from a place on, for PyAV."""

    def __init__(self, file: Any, first: int, name: str):
        self._file, self._first, self._source = file, first, name
        given = getattr(file, "name", None)
        if isinstance(given, str) and _encodable(given):
            self.name = given  # FFmpeg knows a few formats by their ending only
        file.seek(first)

    def read(self, size: int) -> bytes:
        return _read(self._file.read, size, self._source)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._file.seek(offset + (self._first if whence == os.SEEK_SET else 0), whence)
        return self.tell()

    def tell(self) -> int:
        at: int = self._file.tell()
        return at - self._first

    def seekable(self) -> bool:
        return True


@contextmanager
def _open_stream(file: Any, name: str) -> Iterator[InputContainer]:
    stream = _Stream(file, name)
    if not stream.peek(1):
        raise unreadable(name, "empty, 0 bytes")
    if not _needs_its_end(stream):
        with _open(stream) as found:
            yield found
        return
    with tempfile.TemporaryFile() as whole:
        while data := stream.read(COPY):
            whole.write(data)
        with _open_seekable(whole, name) as found:
            yield found


class _Stream:
    """What can be read once, for PyAV, which takes a file object without `seek` for such; its head can be looked at."""

    def __init__(self, file: Any, name: str):
        # As soon as there is anything, where a file object can do that: sound that comes slowly is heard as it comes.
        self._read = getattr(file, "read1", None) or file.read
        self._name = name
        self._head = bytearray()

    def peek(self, size: int) -> bytes:
        """The first bytes, before any is read; fewer where there are no more."""
        while len(self._head) < size and (data := _read(self._read, COPY, self._name)):
            self._head += data
        return bytes(self._head[:size])

    def read(self, size: int) -> bytes:
        if not self._head:
            return _read(self._read, size, self._name)
        data = bytes(self._head[:size])
        del self._head[:size]
        return data


def _read(read: Any, size: int, name: str) -> bytes:
    """Bytes of somebody's file object, b"" at its end."""
    try:
        while (data := read(size)) is None:  # not blocking, and nothing there yet
            time.sleep(0.01)
    except Exception as error:
        raise AudioError(f"{name}: reading it failed ({' '.join(str(error).split())})") from error
    if not isinstance(data, bytes | bytearray | memoryview):
        raise AudioError(f"{name}: its read() gives {type(data).__name__}; open it in binary mode ('rb')")
    return bytes(data)


def _needs_its_end(stream: _Stream) -> bool:
    """Whether a stream has to be read to its end first: an mp4 whose index comes behind its sound; Apple's caf."""
    if stream.peek(4) == b"caff":
        return True
    at = 0
    while at < HEAD and len(head := stream.peek(at + 16)[at:]) >= 8:
        size, kind = struct.unpack(">I4s", head[:8])
        if kind in MOVIE or (at == 0 and kind not in BOXES):
            return False
        if size == 1 and len(head) == 16:
            (size,) = struct.unpack(">Q", head[8:])
        if kind == b"mdat" or size < 8:
            return True
        at += size
    return at > 0


def _seekable(file: Any) -> bool:
    """Whether one can go back and forth in it, to its end as well; it stays where it stands."""
    try:
        at = file.tell()
        if hasattr(file, "seekable") and not file.seekable():
            return False
        file.seek(0, os.SEEK_END)
        file.seek(at)
    except Exception:  # whatever somebody's object raises: try it as a stream
        return False
    return True
