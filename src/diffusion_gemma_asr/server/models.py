"""The models of a server: loaded when they are asked for, unloaded when nobody asks any more, each with its scheduler."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ..audio.vad import speech_finder
from ..checkpoint.config_file import read_config_file
from ..checkpoint.load import find_checkpoint, load_checkpoint
from ..errors import AsrError, first_line
from ..memory import give_back_memory
from ..model.model import DiffusionGemmaASR
from ..strict import is_path, suggest
from .errors import ApiError, unavailable
from .realtime_session import LiveSession
from .scheduler import Scheduler
from .settings import ServerSettings

ALIASES = ("whisper-1", "gpt-transcribe", "gpt-4o-transcribe", "gpt-4o-mini-transcribe", "gpt-live-transcribe")
LOOK_S = 5.0  # between two looks for models that nobody uses
WARM_FINDERS = 8  # recordings that can be read at once without a delay
DRAIN_S = 600.0  # for requests under way when the server ends

LoadModel = Callable[[str], DiffusionGemmaASR]

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Entry:
    """A model: where it comes from, what loads it now, its scheduler once that is done."""

    source: str
    loading: asyncio.Task[Scheduler] | None = None
    scheduler: Scheduler | None = None
    used: float = field(default_factory=time.monotonic)


class Models:
    """All models of a server; its methods belong to one event loop.

    Args:
        settings: of the server.
        load: what loads a model by its name; None is `load_checkpoint` as the settings say.

    Attributes:
        created: when the server started, seconds since 1970.
        draining: it takes no more requests.
        was_loaded: the default model was loaded once.
        sockets: live transcriptions that are open, or about to be: models stay loaded meanwhile.
        sessions: of these, such as transcribe.
        under_way: transcriptions that are uploaded, wait or run.
    """

    def __init__(self, settings: ServerSettings, load: LoadModel | None = None):
        self.settings, self.created, self.draining = settings, int(time.time()), False
        self.was_loaded = False
        self.sockets = self.under_way = 0
        self.sessions: set[LiveSession] = set()
        self._load = load or partial(
            load_checkpoint,
            device=settings.device,
            dtype=settings.dtype,
            quantization=settings.quantization,
            encoder=settings.encoder,
        )
        self._entries: dict[str, _Entry] = {}
        for source in settings.models:
            name = served_name(source)
            if name in self._entries:
                raise AsrError(f"two models are called {name}; rename a folder")
            self._entries[name] = _Entry(source)
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")  # one after the other
        self._watcher: asyncio.Task[None] | None = None

    # -- what live transcription needs to know -----------------------------------------------------------------------

    @property
    def api_key(self) -> str | None:
        """That opens the server; None: it is open."""
        return self.settings.api_key

    @property
    def origins(self) -> tuple[str, ...]:
        """Other sites whose pages may use the server; "*" is all."""
        return self.settings.origins

    @property
    def max_sockets(self) -> int:
        """Live transcriptions at once."""
        return self.settings.max_sockets

    async def live(self, name: str | None) -> tuple[str, Scheduler]:
        """The name of a model and its scheduler; see `get`."""
        return await self.get(name)

    # -- models -----------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The default model first."""
        return list(self._entries)

    @property
    def schedulers(self) -> dict[str, Scheduler]:
        """Of the models that are loaded."""
        return {name: entry.scheduler for name, entry in self._entries.items() if entry.scheduler is not None}

    @property
    def loading(self) -> bool:
        """Whether a model is being loaded."""
        return any(entry.loading is not None for entry in self._entries.values())

    def languages(self, name: str) -> tuple[str, ...] | None:
        """Codes of the languages of a model; None where that is not known before it is loaded."""
        entry = self._entries[name]
        if entry.scheduler is not None:
            return entry.scheduler.model.config.languages
        try:
            return read_config_file(find_checkpoint(entry.source, local_files_only=True)).languages
        except AsrError:
            return None

    def find(self, name: str | None) -> str:
        """The name of a model by its name or an alias; None is the default one.

        Raises:
            ApiError: there is no such model.
        """
        if name in self._entries:
            return str(name)
        if name is None or name in ALIASES or (name.startswith("gpt-") and "transcribe" in name):
            return self.names[0]
        hint = suggest(name, self.names) or f"; there is {', '.join(self.names)}"
        raise ApiError(404, f"the model {name[:100]!r} does not exist{hint}", param="model", code="model_not_found")

    async def get(self, name: str | None) -> tuple[str, Scheduler]:
        """The name of a model and its scheduler; loads it if need be. It stays loaded at least until the next `await`.

        Raises:
            ApiError: there is no such model, it is still being loaded, or cannot be; or the server is draining.
        """
        name = self.find(name)
        entry = self._entries[name]
        if self.draining:
            raise unavailable("the server is shutting down; try again later", "shutting_down")
        if entry.scheduler is None:
            task = self._begin_loading(name)
            await asyncio.wait([task], timeout=self.settings.load_wait_s)
            if not task.done():
                raise unavailable(f"the model {name} is being loaded; try again later", "model_loading")
            try:
                entry.scheduler = task.result()
            except asyncio.CancelledError:
                raise unavailable("the server is shutting down; try again later", "shutting_down") from None
            except Exception as error:
                text = str(error) if isinstance(error, AsrError) else first_line(error)
                raise unavailable(f"the model {name} cannot be loaded: {text}", "model_not_loaded") from None
        entry.used = time.monotonic()
        return name, entry.scheduler

    def start(self) -> None:
        """Begins to load the default model, and to look for such as nobody uses."""
        self._begin_loading(self.names[0])
        if self.settings.idle_unload_s:
            self._watcher = asyncio.create_task(self._watch())

    def drain(self) -> None:
        """From now on no more requests are taken."""
        self.draining = True

    async def close(self) -> None:
        """Ends everything; what is under way may end."""
        self.drain()
        tasks = [task for task in (self._watcher, *(entry.loading for entry in self._entries.values())) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for entry in self._entries.values():
            if entry.scheduler is not None:
                await asyncio.to_thread(entry.scheduler.close, timeout=DRAIN_S)
                entry.scheduler = None
        await asyncio.to_thread(self._loader.shutdown, cancel_futures=True)

    def _begin_loading(self, name: str) -> asyncio.Task[Scheduler]:
        entry = self._entries[name]
        if entry.loading is None:
            entry.loading = asyncio.create_task(self._loaded(name, entry))
            entry.loading.add_done_callback(lambda task: task.cancelled() or task.exception())  # somebody has looked at it
        return entry.loading

    async def _loaded(self, name: str, entry: _Entry) -> Scheduler:
        started = time.monotonic()
        try:
            model = await asyncio.get_running_loop().run_in_executor(self._loader, self._load_warm, entry.source)
            entry.scheduler = Scheduler(model, rows=self.settings.rows, max_queue=self.settings.max_queue)
            entry.used = time.monotonic()
            self.was_loaded |= name == self.names[0]
            logger.info("loaded %s in %.1f s", name, entry.used - started)
            return entry.scheduler
        except Exception as error:
            logger.error("the model %s cannot be loaded: %s", name, error)
            raise
        finally:
            entry.loading = None

    def _load_warm(self, source: str) -> DiffusionGemmaASR:
        with ExitStack() as stack:  # detectors of speech take a while to make, and are kept for the next who needs one
            for _ in range(WARM_FINDERS):
                stack.enter_context(speech_finder())
        # In a thread that ends: OpenMP keeps helpers for each thread that computed, and where they outnumber the cores they
        # sleep between any two products. Requests took a fifth longer.
        with ThreadPoolExecutor(1) as passing:
            return passing.submit(self._load, source).result()

    async def _watch(self) -> None:
        idle_s = self.settings.idle_unload_s
        while True:
            await asyncio.sleep(min(LOOK_S, idle_s / 4))
            for name, entry in self._entries.items():
                if entry.scheduler is None:
                    continue
                if entry.scheduler.depth or self.sockets:
                    entry.used = time.monotonic()
                elif time.monotonic() - entry.used > idle_s:
                    scheduler, entry.scheduler = entry.scheduler, None
                    await asyncio.to_thread(scheduler.close)
                    del scheduler
                    await asyncio.to_thread(_give_back)
                    logger.info("unloaded %s, which nobody used for %.0f s", name, idle_s)


def served_name(source: str) -> str:
    """What a model is called: its name or hub repository; of a folder the last part."""
    return Path(source).expanduser().resolve().name if is_path(source) else source


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    give_back_memory()
