"""The server under load: what is lost, how much it transcribes, how long clients wait, whether its memory grows.

    python benchmarks/serve.py measure                          all parts; benchmarks/results/serve.json
    python benchmarks/serve.py measure --parts memory beside    these; the others stay as they were measured before
    python benchmarks/serve.py measure --small                  a short run that writes nothing
    python benchmarks/serve.py report                           fills the table of docs/serving.md

The parts, each stored as it ends: `load`, many clients at once, against `transcribe_many`; `beside`, short recordings beside
a long one; `memory`, over many requests. Each has a server in a process of its own, as `transcribe_many` has one. Recordings
are made of examples/en.flac: pieces of it with pauses between them, seeded.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from pages import RESULTS, ROOT, circumstances, fill, markdown, read_results, stated, write_results

from diffusion_gemma_asr.audio.read import SAMPLE_RATE, Samples, load_audio
from diffusion_gemma_asr.checkpoint.load import DEFAULT_MODEL

STORED = RESULTS / "serve.json"
PAGE = ROOT / "docs" / "serving.md"
EXAMPLE = ROOT / "examples" / "en.flac"
MODEL, LANGUAGE = DEFAULT_MODEL, "en"
SHORT_S = 3.0
BRIEF_S = 1.0  # of the many requests over which memory is watched
PATIENCE_S = 3600.0


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        clients: at once.
        recordings: of mixed length, that they send.
        longest_s: of these.
        long_s: of the recording beside which short ones are sent.
        short: how many of these, one after the other.
        many: requests over which memory is watched.
    """

    clients: int = 64
    recordings: int = 200
    longest_s: float = 60.0
    long_s: float = 3600.0
    short: int = 20
    many: int = 2000


SMALL = Size(clients=8, recordings=10, longest_s=6.0, long_s=60.0, short=4, many=40)


def speech(seconds: float, seed: int) -> Samples:
    """Pieces of the example with pauses between them."""
    example, rng = load_audio(EXAMPLE), np.random.default_rng(seed)
    parts: list[Samples] = []
    while sum(map(len, parts)) < seconds * SAMPLE_RATE:
        parts += [example[: rng.integers(SAMPLE_RATE, len(example))], np.zeros(rng.integers(1600, 16_000), np.float32)]
    return np.concatenate(parts)[: round(seconds * SAMPLE_RATE)]


def as_wav(samples: Samples) -> bytes:
    """A WAV file."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return out.getvalue()


def transcribe_files(paths: Sequence[Path], queue: Any) -> None:
    """In a process of its own: the texts of `transcribe_many`, and the seconds it takes once the model is there."""
    import diffusion_gemma_asr as asr

    model = asr.load(MODEL, device="cpu")
    model.transcribe(EXAMPLE, language=LANGUAGE)
    began = time.perf_counter()
    texts = [getattr(result, "text", str(result)) for result in model.transcribe_many(paths, language=LANGUAGE)]
    queue.put((texts, time.perf_counter() - began))


@contextmanager
def server() -> Iterator[tuple[str, psutil.Process]]:
    """A running server: where, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "from diffusion_gemma_asr.server.command import ServeOptions, serve\n"
        f"serve(ServeOptions(model=({MODEL!r},), device='cpu').settings(), '127.0.0.1', {port})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        while process.poll() is None:
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        else:
            raise SystemExit("the server did not start; run `diffusion-gemma-asr serve` to see why")
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


class Clients:
    """Clients of one server.

    Args:
        url: where it is.
        count: of requests at once.
    """

    def __init__(self, url: str, count: int):
        self._url, self._turn = f"{url}/v1/audio/transcriptions", asyncio.Semaphore(count)
        self._form = {"model": MODEL, "language": LANGUAGE}
        limits = httpx.Limits(max_connections=count)
        self.http = httpx.AsyncClient(timeout=PATIENCE_S, limits=limits)

    async def send(self, sound: bytes) -> tuple[str | None, float]:
        """The text of a recording, None where it was lost, and the seconds from sending it to having its text."""
        async with self._turn:
            began = time.perf_counter()
            try:
                answer = await self.http.post(self._url, files={"file": ("a.wav", sound)}, data=self._form)
                text = answer.json().get("text")
            except httpx.TransportError:
                text = None
            return text, time.perf_counter() - began

    async def stream(self, sound: bytes, begun: asyncio.Event) -> bool:
        """Transcribes as a stream; whether it came to its end."""
        form: dict[str, Any] = {"files": {"file": ("long.wav", sound)}, "data": {**self._form, "stream": "true"}}
        last = ""
        async with self.http.stream("POST", self._url, **form) as answer:
            async for line in answer.aiter_lines():
                begun.set()
                last = line or last
        return last == "data: [DONE]"


async def all_at_once(url: str, sounds: Sequence[bytes], size: Size) -> tuple[list[str | None], list[float], float]:
    """Texts, latencies, and the seconds of it all."""
    clients = Clients(url, size.clients)
    async with clients.http:
        began = time.perf_counter()
        answers = await asyncio.gather(*(clients.send(sound) for sound in sounds))
        return [text for text, _ in answers], [seconds for _, seconds in answers], time.perf_counter() - began


async def beside_a_long_one(url: str, short: bytes, long: bytes, size: Size) -> dict[str, Any]:
    """Latencies of a short recording on an idle server, and while a long one is transcribed."""
    clients = Clients(url, 8)
    async with clients.http:
        idle = [(await clients.send(short))[1] for _ in range(size.short)][1:]
        begun = asyncio.Event()
        task = asyncio.create_task(clients.stream(long, begun))
        await begun.wait()
        beside = []
        for number in range(size.short):
            await asyncio.sleep(0.3 + 0.07 * number)  # at ever other moments of what is under way
            if task.done():
                break
            beside.append((await clients.send(short))[1])
        return {"idle_s": idle, "beside_s": beside, "long_one_whole": await task}


async def memory_over(url: str, process: psutil.Process, short: bytes, count: int) -> list[float]:
    """MB of the server's memory after each tenth of so many requests."""
    clients = Clients(url, 16)
    memory = []
    async with clients.http:
        for _ in range(10):
            await asyncio.gather(*(clients.send(short) for _ in range(count // 10)))
            memory.append(round(process.memory_info().rss / 1e6, 1))
    return memory


def percentile(values: Sequence[float], share: float) -> float:
    return round(float(np.quantile(values, share)), 3)


def load(size: Size) -> dict[str, Any]:
    """Recordings of mixed length from many clients, and the same files through `transcribe_many`."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(1.5), np.log(size.longest_s), size.recordings))
    with tempfile.TemporaryDirectory() as folder:
        sounds = [as_wav(speech(seconds, i)) for i, seconds in enumerate(lengths.tolist())]
        paths = [Path(folder) / f"{i}.wav" for i in range(len(sounds))]
        for path, sound in zip(paths, sounds, strict=True):
            path.write_bytes(sound)
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=transcribe_files, args=(paths, queue))
        process.start()
        texts, batch_s = queue.get(timeout=PATIENCE_S)
        process.join()
    with server() as (url, _):
        answers, latencies, server_s = asyncio.run(all_at_once(url, sounds, size))
    total = float(lengths.sum())
    return {
        "clients": size.clients,
        "requests": size.recordings,
        "sound_s": round(total, 1),
        "lost": sum(text is None for text in answers),
        "as_in_batch": sum(ours == theirs for ours, theirs in zip(answers, texts, strict=True)),
        "speed": round(total / server_s, 2),
        "batch_speed": round(total / batch_s, 2),
        "p50_s": percentile(latencies, 0.5),
        "p95_s": percentile(latencies, 0.95),
    }


def beside(size: Size) -> dict[str, Any]:
    """Short recordings on an idle server, then while a long one is transcribed."""
    short, long = as_wav(speech(SHORT_S, 0)), as_wav(speech(size.long_s, 1))
    with server() as (url, _):
        waits = asyncio.run(beside_a_long_one(url, short, long, size))
    if not waits["beside_s"]:
        raise SystemExit("the long recording ended before a short one was sent; make it longer")
    return {
        "long_s": size.long_s,
        "long_one_whole": waits["long_one_whole"],
        "idle_s": round(statistics.median(waits["idle_s"]), 3),
        "beside_s": round(statistics.median(waits["beside_s"]), 3),
        "beside_p95_s": percentile(waits["beside_s"], 0.95),
        "count": len(waits["beside_s"]),
    }


def memory(size: Size) -> dict[str, Any]:
    """What the server takes while it answers many requests."""
    with server() as (url, running):
        taken = asyncio.run(memory_over(url, running, as_wav(speech(BRIEF_S, 0)), size.many))
    return {"many": size.many, "brief_s": BRIEF_S, "memory_mb": taken}


PARTS: dict[str, Callable[[Size], dict[str, Any]]] = {"load": load, "beside": beside, "memory": memory}


def measure(names: Sequence[str], size: Size, measured: dict[str, Any], store: Callable[[dict[str, Any]], None]) -> None:
    """Measures parts, and stores all there is behind each of them.

    Args:
        names: of the parts.
        size: how much is done.
        measured: what was measured before; gets what is new.
        store: takes that.
    """
    for name in names:
        began = time.perf_counter()
        part = PARTS[name](size)
        took = {"took_s": round(time.perf_counter() - began, 1)}
        measured[name] = {"model": MODEL, **part, **took, "circumstances": circumstances()}
        print(name, json.dumps(measured[name]), flush=True)
        store(measured)


def table(measured: dict[str, Any]) -> str:
    """For the page: the parts that were measured."""
    rows: list[list[str]] = []
    if (one := measured.get("load")) is not None:
        rows += [
            ["requests, at once", f"{one['requests']}, {one['clients']}"],
            ["lost", str(one["lost"])],
            ["text as from `transcribe_many`", f"{one['as_in_batch']} of {one['requests']}"],
            ["speed", f"{one['speed']:.1f} × real time"],
            ["of that of `transcribe_many`", f"{one['speed'] / one['batch_speed']:.2f}"],
            ["latency, median and 95th percentile", f"{one['p50_s']:.1f} s, {one['p95_s']:.1f} s"],
        ]
    if (one := measured.get("beside")) is not None:
        minutes, times = one["long_s"] / 60, one["beside_s"] / one["idle_s"]
        rows += [
            [f"{SHORT_S:g} s of sound on an idle server", f"{1000 * one['idle_s']:.0f} ms"],
            [
                f"the same beside {minutes:.0f} minutes, {one['count']} times",
                f"{1000 * one['beside_s']:.0f} ms ({times:.1f} ×)",
            ],
            ["the long one came to its end", "yes" if one["long_one_whole"] else "no"],
        ]
    if (one := measured.get("memory")) is not None:
        first, last = one["memory_mb"][0], one["memory_mb"][-1]
        rows.append([f"memory, {one['many'] // 10} and {one['many']} requests later", f"{first:.0f} MB, {last:.0f} MB"])
    facts = {name: stated(part["circumstances"]) for name, part in measured.items()}
    alike = len({*facts.values()}) == 1
    where = next(iter(facts.values())) if alike else "; ".join(f"{name}: {text}" for name, text in facts.items())
    models = {f"`{part['model']}`" for part in measured.values()}
    return markdown([", ".join(sorted(models)), ""], rows) + f"\n\n{where}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "report"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="of measure; all if none is named")
    parser.add_argument("--small", action="store_true", help="a short run that writes nothing")
    arguments = parser.parse_args()
    if arguments.what == "report":
        if not (measured := read_results(STORED)):
            raise SystemExit(f"{STORED} is not there; measure first")
        fill(PAGE, {"serve": table(measured)})
    elif arguments.small:
        measured = {}
        measure(arguments.parts, SMALL, measured, lambda _: None)
        print(table(measured))
    else:
        measure(arguments.parts, Size(), read_results(STORED), partial(write_results, STORED))


if __name__ == "__main__":
    main()
