"""`diffusion-gemma-asr serve`: its options, and uvicorn around the app."""

from __future__ import annotations

import logging
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from ..checkpoint.load import DEFAULT_MODEL, DTYPE_HELP, find_checkpoint
from ..errors import AsrError
from ..memory import steady_memory
from ..strict import is_path, option
from .app import create_app
from .models import Models
from .settings import ServerSettings

KEEP_ALIVE_S = 30  # an idle connection is kept for so long
SWITCH_S = 0.001  # between threads of Python: requests should not wait for the one that decodes
OPEN_FILES = 65536  # connections and files at once, as far as the system allows


@dataclass(frozen=True)
class ServeOptions:
    """How to serve, as the command line has it."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 is all, which wants an --api_key.")
    port: int = option(8000, "Port to listen on; 0: any that is free.", min=0, max=65535)
    model: tuple[str, ...] = option(
        (DEFAULT_MODEL,), "Models, separated by commas: bundled ones, folders, hub repositories; the first is the default."
    )
    api_key: str | None = option(
        None, "Key that clients must send as Authorization: Bearer KEY.", envvar="DIFFUSION_GEMMA_ASR_API_KEY"
    )
    cors: tuple[str, ...] = option((), "Sites, separated by commas, whose pages may use the server; * is all.")
    max_upload_mb: float = option(ServerSettings.max_upload_mb, "MB of an upload, at most.")
    max_queue: int = option(ServerSettings.max_queue, "Requests that may wait or run at once.", min=1)
    max_sockets: int = option(ServerSettings.max_sockets, "Live transcriptions at once.", min=1)
    idle_unload: float = option(0.0, "Seconds behind which a model that nobody uses is unloaded; 0: never.")
    rows: int = option(ServerSettings.rows, "Stretches of speech decoded at once.", min=1)
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto: the first that is there.")
    dtype: str = option("auto", DTYPE_HELP)
    encoder: str | None = option(None, "Whisper's encoder: a folder or a hub name in place of that which the models name.")
    quantization: str | None = option(None, "bnb-4bit and the like, for large backbones.")

    def __post_init__(self) -> None:
        self.settings()

    def settings(self) -> ServerSettings:
        """What the app is made from. Raises AsrError on impossible values."""
        return ServerSettings(
            models=self.model,
            device=self.device,
            dtype=self.dtype,
            encoder=self.encoder,
            quantization=self.quantization,
            api_key=self.api_key or None,
            origins=self.cors,
            max_upload_mb=self.max_upload_mb,
            max_queue=self.max_queue,
            max_sockets=self.max_sockets,
            rows=self.rows,
            idle_unload_s=self.idle_unload,
        )


class Server(uvicorn.Server):
    """uvicorn's, which takes no more requests from the moment in which it is told to end."""

    def __init__(self, config: uvicorn.Config, models: Models):
        super().__init__(config)
        self._models = models

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn."""
        self._models.drain()
        super().handle_exit(sig, frame)


def serve(settings: ServerSettings, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serves until SIGTERM or Ctrl-C, which let requests under way end; a second Ctrl-C does not wait for them.

    Args:
        settings: how to serve.
        host, port: where to listen.

    Raises:
        AsrError: a model does not exist, or the address cannot be used.
    """
    for name in settings.models:
        if is_path(name) or len(Path(name).parts) != 2:  # it is no hub repository
            find_checkpoint(name)  # before the server says that it runs
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    steady_memory()
    sys.setswitchinterval(SWITCH_S)
    _allow_many_files()
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise AsrError(f"{host}:{port} cannot be used ({error.strerror}); choose another --host or --port") from None
    _server(settings, host, port).run(sockets=[listener])


def _server(settings: ServerSettings, host: str, port: int) -> Server:
    app = create_app(settings)
    config = uvicorn.Config(app, host=host, port=port, timeout_keep_alive=KEEP_ALIVE_S, log_level="info", access_log=False)
    return Server(config, app.state.models)


def _allow_many_files() -> None:
    """Raises the number of files that the process may open: every connection is one."""
    try:
        import resource
    except ImportError:  # Windows has no such bound
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
