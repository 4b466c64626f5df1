"""The ASGI app: OpenAI's routes for speech, health, metrics, and the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np
from fastapi import APIRouter, FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST

from ..audio.read import SAMPLE_RATE
from ..errors import __version__
from ..transcribe.recordings import End, TranscribeOptions
from ..transcribe.results import Segment
from . import realtime, transcriptions
from .errors import ApiError, install, unavailable
from .gate import Gate
from .metrics import Metrics
from .models import LoadModel, Models
from .requests import Busy, Event
from .scheduler import Scheduler
from .settings import ServerSettings

WEB = Path(__file__).parent / "web"
READY_S = 30.0  # a decoding that takes longer is no sign of health
READY_SOUND = (0.05 * np.random.default_rng(0).standard_normal(SAMPLE_RATE // 2)).astype(np.float32)  # half a second
TITLE = "Speech recognition whose decoder is a diffusion language model"


def create_app(settings: ServerSettings, load: LoadModel | None = None) -> FastAPI:
    """The server as an ASGI app; uvicorn, or any other server of ASGI apps, runs it.

    Args:
        settings: how to serve.
        load: what loads a model by its name; None is `load_checkpoint` as the settings say.

    Returns:
        the app; its `state.models` are the `Models`.
    """
    models = Models(settings, load)
    metrics = Metrics(models)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        models.start()
        yield
        await models.close()

    app = FastAPI(title="diffusion-gemma-asr", description=TITLE, version=__version__, lifespan=lifespan)
    app.state.models = models
    install(app)
    app.add_middleware(Gate, models=models, metrics=metrics)
    if settings.origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.origins, allow_methods=["*"], allow_headers=["*"])
    app.include_router(transcriptions.router_for(models, metrics))
    app.include_router(realtime.router_for(models))
    app.include_router(_about(models, metrics))
    if WEB.is_dir():
        app.mount("/web", StaticFiles(directory=WEB), name="web")
    return app


def _about(models: Models, metrics: Metrics) -> APIRouter:
    """Routes that tell of the server itself."""
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> dict[str, object]:
        """The models, the default one first."""
        return {"object": "list", "data": [_model(models, name) for name in models.names]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, object]:
        """One of them."""
        return _model(models, models.find(name))

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether the default model decodes half a second of noise; one that was unloaded, or is busy, counts as ready."""
        if models.draining:
            raise unavailable("the server is shutting down", "shutting_down")
        scheduler = models.schedulers.get(models.names[0])
        if scheduler is not None:
            with suppress(Busy):
                await _decode(scheduler)
        elif models.loading or not models.was_loaded:
            raise unavailable(f"the model {models.names[0]} is not loaded yet", "model_loading")
        return {"status": "ok", "model": "unloaded until it is asked for" if scheduler is None else "loaded"}

    @router.get("/metrics")
    async def counters() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        if not WEB.is_dir():
            raise ApiError(404, "this installation has no page; /docs lists the routes")
        return FileResponse(WEB / "index.html")

    return router


def _model(models: Models, name: str) -> dict[str, object]:
    """A model as OpenAI's API tells it, and its languages, which is ours."""
    languages = models.languages(name)
    told = {"id": name, "object": "model", "created": models.created, "owned_by": "diffusion-gemma-asr"}
    return told if languages is None else {**told, "languages": list(languages)}


async def _decode(scheduler: Scheduler) -> None:
    """Raises AsrError if the scheduler does not decode a short noise in good time."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    outcome: list[Event] = []

    def on_event(event: Event) -> None:
        if not isinstance(event, Segment):
            outcome.append(event)
            loop.call_soon_threadsafe(ended.set)

    request = scheduler.submit(READY_SOUND, TranscribeOptions(vad_method="energy"), on_event)
    try:
        async with asyncio.timeout(READY_S):
            await ended.wait()
    except TimeoutError:
        raise unavailable(f"the model has not answered within {READY_S:.0f} s", "too_slow") from None
    finally:
        scheduler.cancel(request)
    if not isinstance(outcome[0], End):
        raise unavailable(f"the model does not decode: {outcome[0]}", "model_failed")
