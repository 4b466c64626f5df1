"""The server under load: what is lost, how much it transcribes, how long clients wait, whether its memory grows.

    python benchmarks/serve.py measure            writes benchmarks/results/serve.json
    python benchmarks/serve.py measure --small    a short run that writes nothing
    python benchmarks/serve.py report             fills the table of docs/serving.md

The server is a process of its own, and so is `transcribe_many`, which it is compared with. Recordings are made of
examples/en.flac: pieces of it with pauses between them, 1.5 to 60 s long in all, seeded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from pages import RESULTS, ROOT, circumstances, fill, markdown, read_results, stated, write_results

from diffusion_gemma_asr.audio.read import SAMPLE_RATE, Samples, load_audio

STORED = RESULTS / "serve.json"
PAGE = ROOT / "docs" / "serving.md"
EXAMPLE = ROOT / "examples" / "en.flac"
MODEL = "mini"
SHORT_S = 3.0
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


SMALL = Size(clients=16, recordings=20, longest_s=15.0, long_s=240.0, short=6, many=120)


def speech(seconds: float, seed: int) -> Samples:
    """Pieces of the example with pauses between them."""
    example, rng = load_audio(EXAMPLE), np.random.default_rng(seed)
    parts: list[Samples] = []
    while sum(map(len, parts)) < seconds * SAMPLE_RATE:
        parts += [example[: rng.integers(SAMPLE_RATE, len(example))], np.zeros(rng.integers(1600, 16_000), np.float32)]
    return np.concatenate(parts)[: round(seconds * SAMPLE_RATE)]


def write_sound(path: Path, samples: Samples) -> Path:
    """A WAV file."""
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(SAMPLE_RATE)
        out.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def transcribe_files(paths: Sequence[Path], queue: Any) -> None:
    """In a process of its own: the texts of `transcribe_many`, and the seconds it takes once the model is there."""
    import diffusion_gemma_asr as asr

    model = asr.load(MODEL, device="cpu")
    model.transcribe(EXAMPLE)
    began = time.perf_counter()
    texts = [getattr(result, "text", str(result)) for result in model.transcribe_many(paths)]
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
        limits = httpx.Limits(max_connections=count)
        self.http = httpx.AsyncClient(timeout=PATIENCE_S, limits=limits)

    async def send(self, sound: bytes) -> tuple[str | None, float]:
        """The text of a recording, None where it was lost, and the seconds from sending it to having its text."""
        async with self._turn:
            began = time.perf_counter()
            try:
                answer = await self.http.post(self._url, files={"file": ("a.wav", sound)}, data={"model": MODEL})
                text = answer.json().get("text")
            except httpx.TransportError:
                text = None
            return text, time.perf_counter() - began

    async def stream(self, sound: bytes, begun: asyncio.Event) -> bool:
        """Transcribes as a stream; whether it came to its end."""
        form: dict[str, Any] = {"files": {"file": ("long.wav", sound)}, "data": {"model": MODEL, "stream": "true"}}
        last = ""
        async with self.http.stream("POST", self._url, **form) as answer:
            async for line in answer.aiter_lines():
                begun.set()
                last = line or last
        return last == "data: [DONE]"


async def load(url: str, sounds: Sequence[bytes], size: Size) -> tuple[list[str | None], list[float], float]:
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


def measure(size: Size) -> dict[str, Any]:
    """All of it."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(1.5), np.log(size.longest_s), size.recordings))
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_sound(Path(folder) / f"{i}.wav", speech(seconds, i)) for i, seconds in enumerate(lengths.tolist())]
        sounds = [path.read_bytes() for path in paths]
        short = write_sound(Path(folder) / "short.wav", speech(SHORT_S, 0)).read_bytes()
        long = write_sound(Path(folder) / "long.wav", speech(size.long_s, 1)).read_bytes()
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=transcribe_files, args=(paths, queue))
        process.start()
        texts, batch_s = queue.get(timeout=PATIENCE_S)
        process.join()
    with server() as (url, running):
        answers, latencies, took_s = asyncio.run(load(url, sounds, size))
        waits = asyncio.run(beside_a_long_one(url, short, long, size))
        memory = asyncio.run(memory_over(url, running, short, size.many))
    total = float(lengths.sum())
    idle, beside = statistics.median(waits["idle_s"]), statistics.median(waits["beside_s"])
    return {
        "circumstances": circumstances(),
        "model": MODEL,
        "clients": size.clients,
        "requests": size.recordings,
        "sound_s": round(total, 1),
        "lost": sum(text is None for text in answers),
        "as_in_batch": sum(ours == theirs for ours, theirs in zip(answers, texts, strict=True)),
        "speed": round(total / took_s, 2),
        "batch_speed": round(total / batch_s, 2),
        "p50_s": percentile(latencies, 0.5),
        "p95_s": percentile(latencies, 0.95),
        "long_s": size.long_s,
        "long_one_whole": waits["long_one_whole"],
        "short_idle_s": round(idle, 3),
        "short_beside_s": round(beside, 3),
        "short_beside_p95_s": percentile(waits["beside_s"], 0.95),
        "short_beside_count": len(waits["beside_s"]),
        "many": size.many,
        "memory_mb": memory,
    }


def table(result: dict[str, Any]) -> str:
    """For the page."""
    share = result["speed"] / result["batch_speed"]
    times = result["short_beside_s"] / result["short_idle_s"]
    memory = result["memory_mb"]
    rows = [
        ["requests, at once", f"{result['requests']}, {result['clients']}"],
        ["lost", str(result["lost"])],
        ["text as from `transcribe_many`", f"{result['as_in_batch']} of {result['requests']}"],
        ["speed", f"{result['speed']:.1f} × real time"],
        ["of that of `transcribe_many`", f"{share:.2f}"],
        ["latency, median and 95th percentile", f"{result['p50_s']:.1f} s, {result['p95_s']:.1f} s"],
        [f"{SHORT_S:g} s of sound on an idle server", f"{1000 * result['short_idle_s']:.0f} ms"],
        [
            f"the same beside {result['long_s'] / 60:.0f} minutes",
            f"{1000 * result['short_beside_s']:.0f} ms ({times:.1f} ×)",
        ],
        [f"memory, {result['many'] // 10} and {result['many']} requests later", f"{memory[0]:.0f} MB, {memory[-1]:.0f} MB"],
    ]
    return markdown([f"`{result['model']}`", ""], rows) + f"\n\n{stated(result['circumstances'])}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "report"))
    parser.add_argument("--small", action="store_true", help="a short run that writes nothing")
    arguments = parser.parse_args()
    if arguments.what == "measure":
        result = measure(SMALL if arguments.small else Size())
        print(json.dumps(result, indent=1))
        if arguments.small:
            print(table(result))
        else:
            write_results(STORED, result)
    if arguments.what == "report":
        fill(PAGE, {"serve": table(read_results(STORED))})


if __name__ == "__main__":
    main()
