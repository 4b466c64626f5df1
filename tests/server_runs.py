"""A live server of the bundled English model, for tests of what its clients see."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sounds import write_wav

from diffusion_gemma_asr.audio.read import Samples, load_audio
from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.model.model import DiffusionGemmaASR

openai = pytest.importorskip("openai", reason="needs the package openai")
pytest.importorskip("fastapi", reason="needs the extra [server]")
httpx = pytest.importorskip("httpx", reason="needs the package httpx")
srt = pytest.importorskip("srt", reason="needs the package srt")
webvtt = pytest.importorskip("webvtt", reason="needs the package webvtt-py")

from server_fixture import PATIENCE_S, LiveServer, serving  # noqa: E402

from diffusion_gemma_asr.server.settings import ServerSettings  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "en.flac"
SETTINGS = ServerSettings(models=("mini",), device="cpu", rows=8)
TEXT = "follow"  # or followed, as the rest of the sound has it: so the bundled model begins EXAMPLE


@pytest.fixture(scope="module")
def model() -> DiffusionGemmaASR:
    return load_checkpoint("mini", device="cpu", local_files_only=True)


@pytest.fixture(scope="module")
def server(model: DiffusionGemmaASR) -> Iterator[LiveServer]:
    threads = set(threading.enumerate())
    with serving(SETTINGS, lambda name: model) as live:
        yield live
        live.wait_until_quiet()
        assert uploads_on_disk() == BEFORE
    assert not [thread for thread in threading.enumerate() if thread not in threads and not thread.daemon]
    assert not [thread for thread in threading.enumerate() if thread.name in ("engine", "reader", "live")]


@pytest.fixture
def client(server: LiveServer) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def speech() -> Samples:
    return load_audio(EXAMPLE)


@pytest.fixture(scope="module")
def minutes(speech: Samples) -> bytes:
    """A file of 70 seconds, which takes some seconds."""
    return write_wav(np.concatenate([speech, np.zeros(8000, np.float32)] * 20))


def uploads_on_disk() -> list[str]:
    """Temporary files that the process has open; they have no names."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(entry))
    return sorted(link for link in links if link.endswith("(deleted)") and "/tmp" in link)


BEFORE = uploads_on_disk()  # pytest has some of its own


def form(sound: bytes, **fields: str) -> dict[str, Any]:
    """A request's content for httpx."""
    return {"files": {"file": ("sound.wav", sound)}, "data": {"model": "mini", **fields}, "timeout": PATIENCE_S}


@contextlib.contextmanager
def connection(server: LiveServer) -> Iterator[socket.socket]:
    with socket.create_connection(server.address, timeout=PATIENCE_S) as sock:
        yield sock


def header(length: int | None, more: str = "") -> bytes:
    """Of an upload that claims to be so long; None: chunked."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    kind = "Content-Type: multipart/form-data; boundary=x"
    return f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: here\r\n{kind}\r\n{size}\r\n{more}\r\n".encode()


def die(sock: socket.socket) -> None:
    """As the kernel closes the socket of a process that was killed while data waited for it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def start_process(settings: str = "", stderr: int = subprocess.DEVNULL) -> tuple[subprocess.Popen[str], str]:
    """A server of the model mini in a process of its own, which may not answer yet, and its address.

    Args:
        settings: more arguments of `ServeOptions`, as Python has them.
        stderr: of the process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from diffusion_gemma_asr.server.command import ServeOptions, serve\n"
        f"serve(ServeOptions(model=('mini',), device='cpu', {settings}).settings(), '127.0.0.1', {port})"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=stderr, text=True), f"http://127.0.0.1:{port}"


def until(holds: Any) -> None:
    """Waits until a function gives something true."""
    ends = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < ends, "it did not come to pass"
        time.sleep(0.01)


BODY = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
