"""Sound that can be read once only, and file objects that were read before."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from sounds import tone, write, write_film, write_wav

from diffusion_gemma_asr.audio.read import SAMPLE_RATE, describe, duration_of, load_audio, read_blocks
from diffusion_gemma_asr.errors import AudioError


class Once(io.RawIOBase):
    """A file object that cannot seek, as standard input."""

    def __init__(self, data: bytes, largest: int = 1000):
        self._rest, self._largest = io.BytesIO(data), largest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        data = self._rest.read(min(len(buffer), self._largest))
        buffer[: len(data)] = data
        return len(data)


class OnlyRead:
    """The least that a file object can be."""

    def __init__(self, data: bytes):
        self.read = io.BytesIO(data).read


def through_a_pipe(data: bytes) -> Iterator[Path]:
    """A path that can be read once, as the shell's <(...) gives one."""
    reading, writing = os.pipe()

    def fill() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "wb") as file:
            file.write(data)

    writer = threading.Thread(target=fill, daemon=True)
    writer.start()
    try:
        yield Path(f"/dev/fd/{reading}")
    finally:
        os.close(reading)
        writer.join()


def files(folder: Path) -> list[Path]:
    sound = tone(440, 2.0)
    return [
        *(write(folder / f"tone{ending}", sound) for ending in (".wav", ".flac", ".mp3", ".m4a", ".ogg")),
        write_film(folder / "last.mp4", [sound], "aac", picture_s=3.0),  # its index comes last
        write_film(folder / "first.mp4", [sound], "aac", picture_s=3.0, movflags="faststart"),
        write_film(folder / "pieces.mp4", [sound], "aac", picture_s=3.0, movflags="frag_keyframe+empty_moov"),
        write_film(folder / "film.mov", [sound], "pcm_s16le"),
        write_film(folder / "film.mkv", [sound], "aac", picture_s=3.0),
        write_film(folder / "film.ts", [sound], "aac", picture_s=3.0),
        write_film(folder / "film.webm", [tone(440, 2.0, 48_000)], "libopus", rate=48_000),
        write_film(folder / "film.avi", [sound], "pcm_s16le", picture_s=3.0),
        write_film(folder / "apple.caf", [sound], "alac"),
    ]


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="there is no /dev/fd")
def test_every_format_can_be_read_once(tmp_path: Path) -> None:
    for path in files(tmp_path):
        data, expected = path.read_bytes(), load_audio(path)
        assert len(expected) / SAMPLE_RATE == pytest.approx(2.0, abs=0.15), path
        for make in through_a_pipe_and_objects(data):
            for source in make():
                samples = load_audio(source)
                assert len(samples) == pytest.approx(len(expected), abs=800), (
                    f"{path} {source}"
                )  # an mp3's end is not trimmed
                both = min(len(samples), len(expected)) - 100
                np.testing.assert_array_equal(samples[:both], expected[:both], err_msg=f"{path} {source}")


def through_a_pipe_and_objects(data: bytes) -> list[Callable[[], Iterator[object]]]:
    return [
        lambda: through_a_pipe(data),
        lambda: iter([Once(data)]),
        lambda: iter([io.BufferedReader(Once(data, 10**6))]),
        lambda: iter([OnlyRead(data)]),
    ]


def test_standard_input(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", [tone(440, 2.0)], "aac", picture_s=3.0)
    code = (
        "import sys; from diffusion_gemma_asr.audio.read import *\n"
        "source = {'path': '/dev/stdin', 'object': sys.stdin.buffer}[sys.argv[1]]\n"
        "print(describe(source), duration_of('/dev/stdin'), len(load_audio(source)))"
    )
    for kind, name in (("path", "/dev/stdin"), ("object", "<stdin>")):
        for data in (path.read_bytes(), write_wav(tone(440, 2.0))):
            told = subprocess.run(
                [sys.executable, "-c", code, kind], input=data, capture_output=True, check=True, timeout=60
            ).stdout.split()
            assert told[:2] == [name.encode(), b"None"]
            assert int(told[2]) == pytest.approx(2 * SAMPLE_RATE, abs=0.1 * SAMPLE_RATE)


def test_duration_never_opens_what_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert duration_of(pipe) is None  # opening it would wait for a writer for ever
    assert duration_of(tmp_path) is None
    assert duration_of("/dev/null") is None


def test_sound_is_heard_as_it_comes() -> None:
    reading, writing = os.pipe()
    heard, in_time = threading.Event(), []

    def feed() -> None:
        whole, begun = write_wav(tone(440, 10.0)), 44 + 2 * 5 * SAMPLE_RATE
        with os.fdopen(writing, "wb", buffering=0) as file:
            file.write(whole[:begun])
            in_time.append(heard.wait(10))
            file.write(whole[begun:])

    writer = threading.Thread(target=feed, daemon=True)
    writer.start()
    with os.fdopen(reading, "rb") as pipe:
        blocks = read_blocks(pipe)
        total = sum(len(next(blocks)) for _ in range(3))
        heard.set()
        assert total + sum(map(len, blocks)) == 10 * SAMPLE_RATE
    writer.join()
    assert in_time == [True]


def test_a_stream_without_end_is_not_kept() -> None:
    class Endless(OnlyRead):
        def __init__(self) -> None:
            self.taken = 0
            header = write_wav(np.zeros(0, np.float32))
            self._next = header[:4] + b"\xff\xff\xff\xff" + header[8:40] + b"\xff\xff\xff\xff"

        def read(self, size: int) -> bytes:
            data, self._next = self._next or bytes(size), b""
            self.taken += len(data)
            return data

    source = Endless()
    blocks = read_blocks(source)
    total = sum(len(next(blocks)) for _ in range(60))
    assert source.taken < 2 * total + (8 << 20)
    blocks.close()


@pytest.mark.parametrize("data", [b"", b"no sound at all" * 10, bytes(100_000)])
def test_streams_that_are_no_sound(tmp_path: Path, data: bytes) -> None:
    for make in through_a_pipe_and_objects(data):
        for source in make():
            with pytest.raises(AudioError, match="cannot be read as sound"):
                load_audio(source)


class Broken(OnlyRead):
    def read(self, size: int) -> bytes:
        raise ConnectionError("the line\nis dead")


def test_file_objects_that_fail() -> None:
    for source, says in (
        (Broken.__new__(Broken), r"<Broken>: reading it failed \(the line is dead\)"),
        (io.BytesIO(), "empty, 0 bytes"),
    ):
        with pytest.raises(AudioError, match=says) as caught:
            load_audio(source)
        assert "\n" not in str(caught.value)
    closed = io.BytesIO(write_wav(tone(440, 1.0)))
    closed.close()
    with pytest.raises(AudioError, match=r"reading it failed .*closed file"):
        load_audio(closed)
    text = OnlyRead(b"")
    text.read = io.StringIO("text").read  # type: ignore[assignment]
    with pytest.raises(AudioError, match=r"its read\(\) gives str; open it in binary mode"):
        load_audio(text)
    cut = gzip.compress(write_wav(np.random.default_rng(0).uniform(-0.5, 0.5, 32_000)))
    with pytest.raises(AudioError, match=r"reading it failed \(Compressed file ended"):
        load_audio(gzip.GzipFile(fileobj=io.BytesIO(cut[: len(cut) // 2])))


def test_file_objects_of_other_libraries(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", [tone(440, 2.0)], "aac")
    data, expected = path.read_bytes(), load_audio(path)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("film.mp4", data)
    with zipfile.ZipFile(archive) as zipped, zipped.open("film.mp4") as member:
        np.testing.assert_array_equal(load_audio(member), expected)
    np.testing.assert_array_equal(load_audio(gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(data)))), expected)
    with tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(data)
        np.testing.assert_array_equal(load_audio(spooled), expected)
    for view in (bytearray(data), memoryview(data)):
        np.testing.assert_array_equal(load_audio(view), expected)


@pytest.mark.parametrize("ending", [".wav", ".flac", ".mp3", ".m4a", ".ogg"])
def test_a_file_object_that_was_read_before(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"tone{ending}", tone(440, 3.0))
    data, expected = path.read_bytes(), load_audio(path)
    file = io.BytesIO(data)
    np.testing.assert_array_equal(load_audio(file), expected)
    np.testing.assert_array_equal(load_audio(file), expected)  # it stands at its end
    for position in (4, 261, 2048, len(data) // 2, len(data) - 1, len(data)):  # as what guesses at types leaves it
        file.seek(position)
        np.testing.assert_array_equal(load_audio(file), expected)
    with path.open("rb") as opened:
        opened.read(512)
        np.testing.assert_array_equal(load_audio(opened), expected)


@pytest.mark.parametrize("ending", [".wav", ".flac", ".m4a", ".ogg", ".mp3"])
def test_a_file_object_that_stands_where_sound_begins(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"tone{ending}", tone(440, 3.0))
    for before in (b"a header of somebody's own", write_wav(tone(880, 1.0))):
        if ending == ".mp3" and before.startswith(b"RIFF") and not path.read_bytes().startswith(b"ID3"):
            continue
        file = io.BytesIO(before + path.read_bytes())
        file.seek(len(before))
        np.testing.assert_array_equal(load_audio(file), load_audio(path))


def test_names_of_sources(tmp_path: Path) -> None:
    path = write(tmp_path / "tone.wav", tone(440, 1.0))
    with path.open("rb") as file:
        assert describe(file) == describe(path) == str(path)
    assert describe(io.BytesIO()) == "<BytesIO>" and describe(np.zeros(3)) == "<ndarray>" and describe(b"") == "<bytes>"


def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "tone.wav", tone(440, 1.0))
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.wav")
    try:
        os.rename(path, odd)
    except OSError:
        pytest.skip("the file system takes names in UTF-8 only")
    assert len(load_audio(odd)) == SAMPLE_RATE and duration_of(odd) == pytest.approx(1.0)
    with pytest.raises(AudioError, match="cannot be read as sound"):
        load_audio(tmp_path / ("long" * 100))
