"""A server in a thread, on a free port of the loopback interface, for tests that talk to it as its clients do."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from diffusion_gemma_asr.server.app import create_app
from diffusion_gemma_asr.server.models import LoadModel, Models
from diffusion_gemma_asr.server.settings import ServerSettings

PATIENCE_S = 60.0


@dataclass
class LiveServer:
    """A running server.

    Attributes:
        url: where it is, without a slash at its end.
        models: of the app behind it.
    """

    url: str
    models: Models

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def get(self, path: str, **how: Any) -> httpx.Response:
        """One request."""
        return httpx.get(self.url + path, timeout=PATIENCE_S, **how)

    def transcribe(self, sound: bytes, name: str = "sound.wav", headers: Any = None, **fields: Any) -> httpx.Response:
        """One transcription, as OpenAI documents it for curl."""
        data = {"model": "mini", **fields}
        files = {"file": (name, sound)}
        return httpx.post(f"{self.url}/v1/audio/transcriptions", data=data, files=files, headers=headers, timeout=PATIENCE_S)

    @property
    def quiet(self) -> bool:
        """Whether nothing is under way: no request, no row, no upload."""
        schedulers = self.models.schedulers.values()
        return not self.models.under_way and not any(s.depth or s.busy_rows for s in schedulers)

    def wait_until_quiet(self) -> None:
        """Waits until nothing is under way."""
        ends = time.monotonic() + PATIENCE_S
        while not self.quiet:
            assert time.monotonic() < ends, "something is still under way"
            time.sleep(0.01)


@contextlib.contextmanager
def serving(settings: ServerSettings, load: LoadModel | None = None, ready: bool = True) -> Iterator[LiveServer]:
    """A server while the block runs.

    Args:
        settings: of the server.
        load: what loads a model by its name.
        ready: wait until its default model is loaded.
    """
    app = create_app(settings, load)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), name="server", daemon=True)
        thread.start()
        live = LiveServer(f"http://127.0.0.1:{listening.getsockname()[1]}", app.state.models)
        ends = time.monotonic() + PATIENCE_S
        while not server.started or (ready and live.get("/ready").status_code != 200):
            assert time.monotonic() < ends and thread.is_alive(), "the server does not start"
            time.sleep(0.02)
        try:
            yield live
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "the server does not end"
