"""The command `diffusion-gemma-asr serve`."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import AsrError

NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "websockets")
if missing := [name for name in NEEDED if find_spec(name) is None]:
    raise AsrError(f"serving needs {missing[0]}: pip install 'diffusion-gemma-asr[server]'")

from ..server.command import ServeOptions  # noqa: E402
from ..server.command import serve as run_server  # noqa: E402
from .options import with_options  # noqa: E402


@with_options
def serve(*, options: ServeOptions) -> None:
    """Answers OpenAI's transcription routes, the realtime socket, and a web page."""
    run_server(options.settings(), options.host, options.port)
