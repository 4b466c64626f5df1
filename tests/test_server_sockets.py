"""Live sockets that are killed in the middle of a decoding, how far they are behind, and two thousand of them."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from server_runs import EXAMPLE, TEXT, form, httpx, serving, start_process, until
from spoken import Sound, WordModel
from test_server_realtime import append, audio_input, connect, connect_async, pcm, sessions_left, socket_url, update
from tiny_model import tiny_model

from diffusion_gemma_asr.model.drafts import Encoded
from diffusion_gemma_asr.server.scheduler import Scheduler
from diffusion_gemma_asr.server.settings import ServerSettings

resource = pytest.importorskip("resource", reason="needs limits of open files, which Windows has not")

COUNT, SESSIONS = 2000, 64
PATIENCE_S = 300.0  # for models and two thousand handshakes on a busy machine
SILENT = b"POST /v1/audio/transcr"


def metric(url: str, name: str) -> float:
    """The value of one of the server's gauges."""
    found = re.search(rf"^diffusion_gemma_asr_{name} (\S+)$", httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text, re.M)
    assert found is not None, name
    return float(found[1])


@dataclass
class HeldModel(WordModel):
    """Decodes nothing before it may."""

    may: threading.Event = field(default_factory=threading.Event)

    def encode(self, audio: list[Sound]) -> Encoded:
        assert self.may.wait(PATIENCE_S)
        return super().encode(audio)


def test_how_far_a_session_is_behind_is_counted() -> None:
    held: Any = HeldModel()
    with serving(ServerSettings(models=("mini",), load_wait_s=PATIENCE_S), lambda name: held, ready=False) as server:
        assert metric(server.url, "live_lag_seconds") == 0.0
        with connect(socket_url(server)) as client, connect(socket_url(server)):
            client.send(update(**audio_input(16000, turn_detection=None)))
            client.send(append(pcm(16000, gap_s=0.0)))  # 3 s, which are taken and wait for the model
            until(lambda: any(scheduler.depth for scheduler in server.models.schedulers.values()))
            client.send(append(np.zeros(16_000, "<i2").tobytes()))  # and 1 s, which nobody has taken
            until(lambda: metric(server.url, "live_lag_seconds") == pytest.approx(4.0, abs=0.05))
            assert metric(server.url, "live_sessions") == 2
            held.may.set()
            until(lambda: metric(server.url, "live_lag_seconds") == 0.0)
        until(lambda: not server.models.sessions and not server.models.sockets)
    assert not sessions_left()


CLIENT = """
import sys, time
from websockets.sync.client import connect
client = connect(sys.argv[1])
for event in sys.stdin:
    client.send(event)
time.sleep(3600)
"""


def test_a_client_that_is_killed_gives_up_its_decoding(
    whisper_folder: Path, backbone_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodings: list[Future[Any]] = []
    decode_chunk = Scheduler.decode_chunk

    def watched(*args: Any) -> Future[Any]:
        decodings.append(decode_chunk(*args))
        return decodings[-1]

    monkeypatch.setattr(Scheduler, "decode_chunk", watched)
    model = tiny_model(whisper_folder, backbone_folder, languages=("en",))
    settings = ServerSettings(models=("tiny",), device="cpu", load_wait_s=PATIENCE_S)
    how = {"language": "en", "start": "noise", "steps": 1000}
    chosen = update(format={"type": "audio/pcm", "rate": 16000}, transcription=how)
    with serving(settings, lambda name: model, ready=False) as server:
        client = subprocess.Popen([sys.executable, "-c", CLIENT, socket_url(server)], stdin=subprocess.PIPE, text=True)
        try:
            assert client.stdin is not None
            client.stdin.write(f"{chosen}\n{append(pcm(16000, times=3))}\n")
            client.stdin.close()
            wait(lambda: any(scheduler.busy_rows for scheduler in server.models.schedulers.values()))
        finally:
            client.kill()  # -9
            client.wait()
        until(lambda: not server.models.sockets and not server.models.sessions and server.quiet)
        assert decodings[-1].cancelled()
    assert not sessions_left()


# -- two thousand ------------------------------------------------------------------------------------------------------


@contextmanager
def many_files(count: int) -> Iterator[None]:
    """Lets this process open so many files; skips the test where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"needs {count} open files; {hard} are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def server_process() -> Iterator[tuple[str, psutil.Process]]:
    """A server of its own: where it is, and its process."""
    process, url = start_process(f"max_sockets={SESSIONS}")

    def ready() -> bool:
        assert process.poll() is None, "the server does not start"
        try:
            return bool(httpx.get(f"{url}/ready", timeout=PATIENCE_S).status_code == 200)
        except httpx.TransportError:
            return False

    try:
        wait(ready)
        yield url, psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def wait(holds: Any) -> None:
    """As `until`, for what takes longer."""
    ends = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < ends, "it did not come to pass"
        time.sleep(0.1)


def assert_answers(url: str) -> None:
    """The next request is answered."""
    answer = httpx.post(f"{url}/v1/audio/transcriptions", **{**form(EXAMPLE.read_bytes()), "timeout": PATIENCE_S})
    assert answer.status_code == 200 and answer.json()["text"].startswith(TEXT)


async def open_sockets(url: str) -> None:
    """Opens them all at once: as many as may be are served, the others are told why not and closed."""
    address = url.replace("http", "ws") + "/v1/realtime"
    how = {"open_timeout": PATIENCE_S, "close_timeout": PATIENCE_S, "ping_interval": None}
    clients = await asyncio.gather(*(connect_async(address, **how) for _ in range(COUNT)))
    firsts = [json.loads(await client.recv()) for client in clients]
    refused = [client for client, first in zip(clients, firsts, strict=True) if first["type"] == "error"]
    assert [first["type"] for first in firsts].count("session.created") == SESSIONS
    assert {first["error"]["code"] for first in firsts if first["type"] == "error"} == {"too_many_sessions"}
    await asyncio.gather(*(client.wait_closed() for client in refused))
    assert {client.close_code for client in refused} == {1013}
    await asyncio.to_thread(assert_answers, url)
    await asyncio.gather(*(client.close() for client in clients))


def say_nothing(url: str, process: psutil.Process) -> None:
    """Holds as many connections open that say nothing, or half of a line."""
    port = int(url.rsplit(":", 1)[1])
    with ExitStack() as all_of_them:
        for number in range(COUNT):
            sock = all_of_them.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S))
            if number % 2:
                sock.sendall(SILENT)
        wait(lambda: process.num_fds() > COUNT)
        assert_answers(url)


@pytest.mark.slow
def test_two_thousand_sockets_are_refused_politely_and_leave_nothing() -> None:
    with many_files(COUNT + 500), server_process() as (url, process):
        assert_answers(url)
        files, threads, memory = [], [], []
        for _ in range(3):
            asyncio.run(open_sockets(url))
            say_nothing(url, process)
            wait(lambda: not any(metric(url, name) for name in ("live_sessions", "queue_depth", "busy_rows")))
            wait(lambda: process.num_fds() < COUNT / 2)
            assert_answers(url)
            time.sleep(1.0)  # connections that were kept for the next request end
            files.append(process.num_fds())
            threads.append(process.num_threads())
            memory.append(process.memory_info().rss)
        print(f"files {files}, threads {threads}, MB {[round(size / 1e6, 1) for size in memory]}")
        assert max(files) <= files[0] + 5 and max(threads) <= threads[0] + 5
        assert memory[2] - memory[1] < 45e6  # what is freed goes back to the system late, but a leak goes on
