"""Sound files damaged at random: none may crash, hang or end in a traceback, and what ffmpeg hears is to be heard.

    python tests/fuzz_containers.py --count 2000 --seed 0

Each file is decoded in a process of its own, whose memory and time are limited. Where `ffmpeg` (if it is there) decodes at
least 90 % of the sound of the whole file, `read_blocks` has to yield at least 80 % of that. Every problem is a line, which
names the number of the file; `--only NUMBER` does that one again, `--keep FOLDER` writes the files with problems there.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
from sounds import tone, write, write_film

from diffusion_gemma_asr.audio.read import SAMPLE_RATE, read_blocks
from diffusion_gemma_asr.errors import AudioError

SECONDS = 4.0  # of sound in a file
MEMORY = 1 << 30  # bytes more than there were before
TIME_S = 20
HEARD_BY_FFMPEG, HEARD = 0.9, 0.8


def originals(folder: Path) -> dict[str, bytes]:
    """A file of every container."""
    sound, fine = tone(440, SECONDS), tone(440, SECONDS, 48_000)
    files = [
        *(write(folder / f"tone{ending}", sound) for ending in (".wav", ".flac", ".mp3", ".m4a", ".ogg")),
        write_film(folder / "film.mp4", [sound], "aac", picture_s=SECONDS),
        write_film(folder / "film.mkv", [sound], "aac", picture_s=SECONDS),
        write_film(folder / "film.webm", [fine], "libopus", rate=48_000, picture_s=SECONDS),
        write_film(folder / "film.ts", [sound], "mp2", picture_s=SECONDS),
        write_film(folder / "surround.mkv", [fine], "ac3", rate=48_000),
        write_film(folder / "first.mp4", [sound], "aac", picture_s=SECONDS, movflags="faststart"),
        write_film(folder / "pieces.mp4", [sound], "aac", picture_s=SECONDS, movflags="frag_keyframe+empty_moov"),
        write_film(folder / "stream.aac", [sound], "aac"),
    ]
    return {file.name: file.read_bytes() for file in files}


def mutated(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The file with one to three kinds of damage, and their names."""
    kinds = [rng.choice(KINDS) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    for kind in kinds:
        data = kind(data, rng) if len(data) > 64 else data
    return data, "+".join(kind.__name__ for kind in kinds)


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def beheaded(data: bytes, rng: random.Random) -> bytes:
    return data[rng.randrange(min(len(data), rng.choice([16, 200, 5000]))) :]


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    reach = rng.choice([64, 1024, len(data), len(data)])
    for _ in range(rng.choice([1, 3, 10, 50, 200])):
        changed[rng.randrange(min(len(changed), reach))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwritten(data: bytes, rng: random.Random) -> bytes:
    length = rng.choice([4, 40, 400, 4000])
    at = rng.randrange(len(data))
    what = rng.choice([rng.randbytes(length), bytes(length), b"\xff" * length])
    return data[:at] + what[: len(data) - at] + data[at + length :]


def dropped(data: bytes, rng: random.Random) -> bytes:
    """Packets of a stream that got lost."""
    for _ in range(rng.choice([1, 1, 3, 10])):
        length = rng.choice([188, 188 * 7, 100, 1000, 3])
        at = rng.randrange(len(data)) // 188 * 188 if length % 188 == 0 else rng.randrange(len(data))
        data = data[:at] + data[at + length :]
        if len(data) < 64:
            break
    return data


def lying(data: bytes, rng: random.Random) -> bytes:
    """A number in a header, or in an index at the end, that is not true."""
    form = rng.choice(["<H", ">H", "<I", ">I", "<Q", ">Q"])
    top = 256 ** struct.calcsize(form) - 1
    number = struct.pack(form, rng.choice([0, 1, top, top // 2, top // 2 + 1, rng.randrange(top), rng.randrange(65536)]))
    at = rng.randrange(min(len(data), 512))
    if rng.random() < 0.3:
        at = len(data) - 1 - rng.randrange(min(len(data), 2048))
    return data[:at] + number + data[at + len(number) :]


def doubled(data: bytes, rng: random.Random) -> bytes:
    return data + data[rng.randrange(len(data)) :]


KINDS = (truncated, beheaded, flipped, flipped, overwritten, dropped, dropped, lying, lying, lying, doubled)


class Loud:
    """Counts the seconds in which anything is heard, 20 ms at a time."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._rest = np.zeros(0, np.float32)

    def hear(self, block: np.ndarray) -> None:
        sound = np.concatenate([self._rest, block])
        whole = len(sound) // 320 * 320
        self._rest = sound[whole:]
        with np.errstate(invalid="ignore"):
            self.seconds += 0.02 * int((np.abs(sound[:whole].reshape(-1, 320)).max(axis=1) > 0.02).sum())


def heard_by_ffmpeg(path: Path) -> float:
    """Seconds of sound."""
    command = ["ffmpeg", "-v", "quiet", "-nostdin", "-i", str(path), "-map", "0:a:0", "-t", "60", "-ac", "1", "-ar", "16000"]
    try:
        done = subprocess.run([*command, "-f", "f32le", "-"], capture_output=True, timeout=TIME_S)
    except subprocess.TimeoutExpired:
        return 0.0
    loud = Loud()
    loud.hear(np.frombuffer(done.stdout[: len(done.stdout) // 4 * 4], np.float32))
    return loud.seconds


def decode_apart(path: Path) -> dict[str, object]:
    """Reads a file in a process of its own: {"loud_s": seconds of sound} and perhaps "refused" or "problem"."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.write(writing, json.dumps(_decode(path)).encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        hang = number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL)
        return {"loud_s": 0.0, "problem": "hangs" if hang else f"crashes ({signal.Signals(number).name})"}
    return json.loads(told)


def _decode(path: Path) -> dict[str, object]:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default ends the process, whatever it is in
    signal.alarm(TIME_S)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    loud, total, found = Loud(), 0, {}
    try:
        for block in read_blocks(path):
            loud.hear(block)
            total += len(block)
            if total > 24 * 3600 * SAMPLE_RATE:
                found["problem"] = "yields more than 24 h"
                break
    except AudioError as error:
        found["refused"] = str(error)
        if "\n" in str(error):
            found["problem"] = "an error of several lines"
    except BaseException:
        found["problem"] = "traceback: " + " | ".join(traceback.format_exc().splitlines()[-3:])
    return {"loud_s": loud.seconds, **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    compares = shutil.which("ffmpeg") is not None
    begun, problems, results = time.monotonic(), 0, collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        whole = originals(Path(folder))
        names = sorted(whole)
        for number in range(args.count) if args.only is None else [args.only]:
            rng = random.Random(f"{args.seed} {number}")
            name = names[number % len(names)]
            data, damage = mutated(whole[name], rng)
            path = Path(folder) / f"{number:05}-{name}"
            path.write_bytes(data)
            found = decode_apart(path)
            by_ffmpeg = heard_by_ffmpeg(path) if compares else 0.0
            loud_s, problem = float(found["loud_s"]), found.get("problem")
            impossible = "sampling rate" in str(found.get("refused"))  # ffmpeg plays what says that it has 128 Hz
            if not problem and not impossible and by_ffmpeg >= HEARD_BY_FFMPEG * SECONDS and loud_s < HEARD * by_ffmpeg:
                problem = f"{loud_s:.1f} s of the {by_ffmpeg:.1f} s that ffmpeg decodes ({found.get('refused', 'no error')})"
            results["problem" if problem else "refused" if "refused" in found else "heard"] += 1
            results["compared"] += by_ffmpeg >= HEARD_BY_FFMPEG * SECONDS
            if problem:
                problems += 1
                print(f"{path.name} ({damage}): {problem}", flush=True)
                if args.keep:
                    args.keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, args.keep)
            elif args.only is not None:
                print(f"{path.name} ({damage}): {found}, ffmpeg {by_ffmpeg:.1f} s")
            path.unlink()
    told = ", ".join(f"{results[what]} {what}" for what in ("heard", "refused", "compared"))
    print(f"{sum(results.values()) - results['compared']} files: {told} with ffmpeg, {problems} problems; "
          f"{time.monotonic() - begun:.0f} s")  # fmt: skip
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
