"""`POST /v1/audio/transcriptions`: an upload goes to the scheduler, its text comes back whole or as server-sent events."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from typing import Any, BinaryIO, TypeVar, cast

from fastapi import APIRouter, Request
from fastapi.responses import Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ..audio.read import MIN_DURATION_S, SAMPLE_RATE, read_blocks
from ..denoise.clip import Shown
from ..errors import AsrError, AudioError
from ..transcribe.recordings import End
from ..transcribe.results import Segment, Transcript, joiner, language_of
from . import requests as queue
from .answers import answer, as_json, canvas_event, logprob_list, segment_event, spoken, usage
from .errors import ApiError, api_error, busy
from .fields import FIELDS, Asked, read_fields
from .metrics import Metrics
from .models import Models
from .scheduler import Scheduler

PING_S = 10.0  # without news a stream says that it is alive
MAX_FIELDS = 100
MAX_STEPS_WAITING = 512  # canvases that wait for a slow client; then steps are left out
GONE = 499  # nobody reads this answer

_T = TypeVar("_T")
_Step = tuple[int, int, list[Shown]]


def router_for(models: Models, metrics: Metrics) -> APIRouter:
    """The routes under /v1/audio."""
    router = APIRouter()

    @router.post("/v1/audio/transcriptions", openapi_extra={"requestBody": _form_schema()}, response_model=None)
    async def transcriptions(request: Request) -> Response:
        """Transcribes a recording; OpenAI's route, see docs/serving.md for what differs."""
        work = Work(models, metrics)
        try:
            response = await _transcribe(request, work)
            if not isinstance(response, Events):
                work.close()
            return response
        except ClientDisconnect:
            work.close()
            return Response(status_code=GONE)
        except BaseException:
            work.close()
            raise

    @router.post("/v1/audio/translations")
    async def translations() -> Response:
        """Refuses: these models write down what they hear, in its own language."""
        message = "translation is not possible here; /v1/audio/transcriptions writes speech down in its own language"
        raise ApiError(400, message, code="unsupported")

    return router


async def _transcribe(request: Request, work: Work) -> Response:
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "send a form of the type multipart/form-data, with the recording as its field file")
    form = await request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=1 << 16)
    work.form = form
    asked = read_fields(form)
    models = work.models
    models.find(asked.model or None)
    work.upload = Upload(asked.file.file, asked.file.filename or "the file")
    await asyncio.to_thread(work.upload.check)
    _, scheduler = await models.get(asked.model or None)
    asked.check(scheduler.model)
    work.begin(scheduler, asked)
    if asked.stream:
        return Events(work)
    return await _unless_gone(request, work.answer())


def _form_schema() -> dict[str, Any]:
    properties = {name: {**schema, "description": text} for name, (schema, text) in FIELDS.items()}
    schema = {"type": "object", "required": ["file", "model"], "properties": properties}
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


class Upload:
    """A file that a client sent, as binary file objects are. Closed, it is at its end for whoever still reads it elsewhere.

    Args:
        file: that holds it, and vanishes when it is closed.
        name: that the client gave it.
    """

    def __init__(self, file: BinaryIO, name: str):
        self._file: BinaryIO | None = file
        self._lock = threading.Lock()
        self._name = name[-100:]

    def read(self, size: int = -1) -> bytes:
        """See io."""
        with self._lock:
            return b"" if self._file is None else self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See io."""
        with self._lock:
            if self._file is None:
                return 0
            self._file.seek(offset, whence)
            return self._file.tell()

    def tell(self) -> int:
        """See io."""
        return self.seek(0, io.SEEK_CUR)

    def readable(self) -> bool:
        """See io."""
        return True

    def seekable(self) -> bool:
        """See io."""
        return True

    def close(self) -> None:
        """See io."""
        with self._lock:
            file, self._file = self._file, None
        if file is not None:
            file.close()

    def check(self) -> None:
        """Reads the first second of the sound. Raises AudioError where that cannot be done."""
        try:
            blocks = read_blocks(cast(BinaryIO, self))
            if len(next(blocks)) < MIN_DURATION_S * SAMPLE_RATE:
                next(blocks, None)  # the end, which knows that it is too short
            del blocks
        except AudioError as error:
            raise self.named(error) from None
        self.seek(0)

    def named(self, error: AsrError) -> AsrError:
        """An error about the sound, with the name that the client knows."""
        if isinstance(error, AudioError):
            return AudioError(str(error).replace(f"<{type(self).__name__}>", self._name, 1))
        return error


class Work:
    """A transcription on its way: its upload, its place in the queue, and what comes of it.

    Args:
        models: of the server.
        metrics: in which its sound is counted.

    Attributes:
        form: with all that was uploaded, once it is there.
        upload: the recording in it.

    Raises:
        ApiError: too many are on their way.
    """

    def __init__(self, models: Models, metrics: Metrics):
        if models.under_way >= models.settings.max_queue:
            raise busy(f"{models.under_way} requests are waiting; try again later")
        models.under_way += 1
        self.models = models
        self.upload: Upload | None = None
        self.form: FormData | None = None
        self._metrics, self._loop = metrics, asyncio.get_running_loop()
        self._news: asyncio.Queue[queue.Event | _Step] = asyncio.Queue()
        self._scheduler: Scheduler | None = None
        self._request: queue.Request | None = None
        self._closed = False

    def begin(self, scheduler: Scheduler, asked: Asked) -> None:
        """Gets in the queue. Raises AsrError if there is no place."""
        self._scheduler, self.asked = scheduler, asked
        self._request = scheduler.submit(
            cast(BinaryIO, self.upload),
            asked.options,
            self._on_event,
            self._on_step if asked.canvas else None,
            asked.logprobs,
        )

    def close(self) -> None:
        """Frees all that it has; what is under way of it ends."""
        if self._closed:
            return
        self._closed = True
        self.models.under_way -= 1
        if self._scheduler is not None and self._request is not None:
            self._scheduler.cancel(self._request)
        if self.upload is not None:
            self.upload.close()
        for _, value in self.form.multi_items() if self.form is not None else ():
            if isinstance(value, UploadFile):
                value.file.close()

    async def answer(self) -> Response:
        """The whole answer. Raises AsrError where the sound cannot be transcribed to its end."""
        segments: list[Segment] = []
        while not isinstance(event := await self._news.get(), End | AsrError):
            if isinstance(event, Segment):
                segments.append(event)
        if isinstance(event, AsrError):
            raise self._told(event)
        self._metrics.sound.inc(event.duration)
        language = language_of(segments, self._language)
        transcript = Transcript.from_segments(tuple(segments), language, event.duration)
        parts = [self._logprobs(segment) for segment in segments]
        return await asyncio.to_thread(answer, transcript, self.asked, parts)

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        segments: list[Segment] = []
        texts: list[str] = []
        while True:
            try:
                async with asyncio.timeout(PING_S):
                    event = await self._news.get()
            except TimeoutError:
                yield KEEPALIVE_COMMENT
                continue
            if isinstance(event, Segment):
                text = (joiner(event.language) if texts else "") + event.text
                segments.append(event)
                texts.append(text)
                if self.asked.response_format == "verbose_json":
                    yield _sse(segment_event(event))
                logprobs = {"logprobs": logprob_list(self._logprobs(event))} if self.asked.logprobs else {}
                yield _sse({"type": "transcript.text.delta", "delta": text, **logprobs})
            elif isinstance(event, End):
                self._metrics.sound.inc(event.duration)
                every = [entry for segment in segments for entry in logprob_list(self._logprobs(segment))]
                more = {**spoken(segments), **usage(event.duration), **({"logprobs": every} if self.asked.logprobs else {})}
                yield _sse({"type": "transcript.text.done", "text": "".join(texts), **more})
                break
            elif isinstance(event, AsrError):
                yield format_sse_event(data_str=as_json(api_error(self._told(event)).body()), event="error")
                break
            else:
                yield _sse(canvas_event(*event))
        yield format_sse_event(data_str="[DONE]")

    @property
    def _language(self) -> str:
        """What stands for the language where nothing was said."""
        assert self._scheduler is not None
        code = self.asked.options.decode.codes[0]
        return self._scheduler.model.config.languages[0] if code == "auto" else code

    def _logprobs(self, segment: Segment) -> queue.TokenLogprobs:
        assert self._request is not None
        return (self._request.logprobs or {}).get(segment.id, [])

    def _told(self, error: AsrError) -> AsrError:
        return error if self.upload is None else self.upload.named(error)

    def _on_event(self, event: queue.Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._news.put_nowait, event)

    def _on_step(self, chunk: int, step: int, shown: list[Shown]) -> None:
        if self._news.qsize() < MAX_STEPS_WAITING:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._news.put_nowait, (chunk, step, shown))


class Events(EventSourceResponse):
    """The events of a work, which is closed behind the last one or when the client goes."""

    def __init__(self, work: Work):
        super().__init__(work.events(), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._work.close()


def _sse(event: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=as_json(event), event=event["type"])


async def _unless_gone(request: Request, wanted: Awaitable[_T]) -> _T:
    """What is wanted; raises ClientDisconnect when nobody waits for it any more."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(wanted), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()  # type: ignore[return-value]
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
