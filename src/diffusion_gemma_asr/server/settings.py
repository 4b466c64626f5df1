"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import AsrError


@dataclass(frozen=True)
class ServerSettings:
    """How to serve. Raises AsrError on impossible values.

    Attributes:
        models: names, folders or hub repositories; the first one is the default. They are loaded when they are asked for,
            the first one at the start.
        device, dtype, encoder, quantization: see `checkpoint.load.load_checkpoint`.
        api_key: that /v1 and /metrics ask for; None: they are open.
        origins: sites, such as https://example.org, whose pages may use the server; "*" is all.
        max_upload_mb: size of an upload at most, in MB of 1,000,000 bytes.
        max_queue: requests, of all models, that may be uploaded, wait or run at once.
        max_sockets: live transcriptions at once.
        rows: canvases under way at once, for each model.
        idle_unload_s: seconds without a request behind which a model is unloaded; 0: never.
        load_wait_s: seconds that a request waits for its model to be loaded, before it is told to come again.
        body_wait_s: seconds that a client may take between two pieces of what it uploads.
    """

    models: tuple[str, ...]
    device: str = "auto"
    dtype: str = "auto"
    encoder: str | None = None
    quantization: str | None = None
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    max_upload_mb: float = 200.0
    max_queue: int = 256
    max_sockets: int = 64
    rows: int = 16
    idle_unload_s: float = 0.0
    load_wait_s: float = 30.0
    body_wait_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.models:
            raise AsrError("no model is named; name at least one")
        for name in ("max_upload_mb", "max_queue", "max_sockets", "rows", "body_wait_s"):
            if not getattr(self, name) > 0:
                raise AsrError(f"{name} is {getattr(self, name)}; it must be more than 0")
        for name in ("idle_unload_s", "load_wait_s"):
            if not getattr(self, name) >= 0:
                raise AsrError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key.strip()):
            raise AsrError("api_key must be printable ASCII, and not empty")

    @property
    def max_upload(self) -> int:
        """In bytes."""
        return int(self.max_upload_mb * 1_000_000)
