"""Files as people have them, cut off, damaged, with headers that lie: each gives a text or a line, none stops the others."""

from __future__ import annotations

import random
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_runs import Loader
from sounds import tone, write, write_wav

from diffusion_gemma_asr.app.cli import main

FORMATS = (".wav", ".flac", ".mp3", ".m4a", ".ogg")
LIMIT_S = 300


@contextmanager
def no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"not done within {LIMIT_S} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)


def patched(data: bytes, at: int, form: str, value: int) -> bytes:
    """The bytes with a number written over them."""
    number = struct.pack(form, value)
    return data[:at] + number + data[at + len(number) :]


def odd_files(folder: Path) -> list[Path]:
    """200 of them."""
    rng = random.Random(0)
    whole = {ending: write(folder / f"whole{ending}", tone(440, 1.0)).read_bytes() for ending in FORMATS}
    wav = write_wav(tone(440, 1.0))
    odd = {
        "no-channels.wav": patched(wav, 22, "<H", 0),
        "many-channels.wav": patched(wav, 22, "<H", 65535),
        "1-hz.wav": patched(wav, 24, "<I", 1),
        "0-hz.wav": patched(wav, 24, "<I", 0),
        "4-ghz.wav": patched(wav, 24, "<I", 2**32 - 1),
        "no-bits.wav": patched(wav, 34, "<H", 0),
        "codec-unknown.wav": patched(wav, 20, "<H", 0x7777),
        "claims-4-gb.wav": patched(patched(wav, 40, "<I", 2**32 - 1), 4, "<I", 2**32 - 1),
        "claims-nothing.wav": patched(wav, 40, "<I", 0),
        "only-header.wav": wav[:44],
        "half-header.wav": wav[:20],
        "one-byte.wav": b"R",
        "empty.mp3": b"",
        "zeros.flac": bytes(5000),
        "text.ogg": b"This is not sound.\n" * 100,
        "wrong-ending.mp3": whole[".flac"],
        "twice.wav": wav + wav,
        "junk-before.mp3": bytes(range(256)) * 8 + whole[".mp3"],
        "junk-behind.flac": whole[".flac"] + bytes(range(256)) * 8,
        "spaces and ünïcode 你好.wav": wav,
    }
    while len(odd) < 120:
        ending = rng.choice(FORMATS)
        odd[f"cut-{len(odd)}{ending}"] = whole[ending][: rng.randrange(len(whole[ending]))]
    while len(odd) < 200:
        ending = rng.choice(FORMATS)
        data = bytearray(whole[ending])
        for _ in range(rng.choice([1, 10, 100])):
            data[rng.randrange(min(len(data), rng.choice([64, len(data)])))] = rng.randrange(256)
        odd[f"damaged-{len(odd)}{ending}"] = bytes(data)
    (folder / "odd").mkdir()
    for name, data in odd.items():
        (folder / "odd" / name).write_bytes(data)
    return sorted((folder / "odd").iterdir())


def test_200_odd_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = odd_files(tmp_path)
    assert len(files) == 200
    with no_hang(), pytest.raises(SystemExit) as left:
        main(["transcribe", *map(str, files), "--vad_method", "energy"], load=Loader())
    assert left.value.code == 1
    out, err = capfd.readouterr()  # the decoders' own messages would be seen here as well
    told = {line.split("\t")[0] for line in out.splitlines()}
    failed = {line.removeprefix("error: ").split(": ")[0] for line in err.splitlines()[:-2] if line.startswith("error: ")}
    assert told | failed == {str(file) for file in files} and not told & failed
    assert len(out.splitlines()) + sum(line.startswith("error: ") for line in err.splitlines()[:-1]) == 200
    assert 20 < len(failed) < 180
    for name in ("no-channels.wav", "1-hz.wav", "empty.mp3", "text.ogg", "half-header.wav"):
        assert str(tmp_path / "odd" / name) in failed
    for name in ("spaces and ünïcode 你好.wav", "wrong-ending.mp3", "claims-4-gb.wav", "junk-behind.flac"):
        assert f"{tmp_path / 'odd' / name}\t440 hertz" in out
