"""`WS /v1/realtime`: OpenAI's realtime transcription session.

The asyncio side reads events and sends events; a `LiveSession` with a thread of its own transcribes. Nothing between them
grows without bound: where too much sound waits no more is read from the socket, and a client that does not take its events
is let go.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import secrets
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from urllib.parse import urlsplit

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from ..errors import AsrError
from .errors import ApiError, api_error
from .realtime_session import LiveSession, error_event
from .realtime_settings import Session, bad
from .scheduler import Scheduler

CAN_BE_MISSED = ("transcript.partial", "transcript.lag")
MIN_COMMIT_S = 0.1
GONE = (RuntimeError, WebSocketDisconnect, TimeoutError)  # what sending raises where nobody takes it
MAX_REASON = 123  # bytes, of the protocol
MAX_ID = 512  # characters of a client's event_id that are told back
KEY_PROTOCOL = "openai-insecure-api-key."  # browsers cannot set headers: the key may be a subprotocol
TOO_MANY, REFUSED, ENDED = 1013, 1008, 1011  # close codes


@dataclass(frozen=True)
class Limits:
    """What one client may take up.

    Attributes:
        waiting_s: seconds of sound that wait for the model; then the socket is not read until some of it is transcribed.
        waiting: blocks of sound and orders that wait, likewise.
        append_s: seconds of sound in one event.
        events: that wait for the client; then it is let go.
        few_events: with more of them waiting, those that can be missed are left out.
        send_s: seconds for one event to leave; then the client is let go.
        close_s: seconds for the socket to close.
    """

    waiting_s: float = 60.0
    waiting: int = 4096
    append_s: float = 120.0
    events: int = 512
    few_events: int = 64
    send_s: float = 30.0
    close_s: float = 5.0


class LiveModels(Protocol):
    """What the socket needs to know of the server."""

    @property
    def api_key(self) -> str | None:
        """That opens the server; None: it is open."""

    @property
    def origins(self) -> tuple[str, ...]:
        """Other sites whose pages may use the server; "*" is all."""

    @property
    def max_sockets(self) -> int:
        """Live sessions at once."""

    @property
    def sessions(self) -> set[LiveSession]:
        """Those that are open."""

    async def live(self, name: str | None) -> tuple[str, Scheduler]:
        """The name of a model, by its name or an alias or None for the default one, and its scheduler; raises ApiError."""


def router_for(models: LiveModels, limits: Limits | None = None) -> APIRouter:
    """The route of live transcription.

    Args:
        models: of the server.
        limits: None is `Limits()`.
    """
    router = APIRouter()
    open_sessions: set[_Socket] = set()

    @router.websocket("/v1/realtime")
    async def realtime(socket: WebSocket, model: str | None = None) -> None:
        if (refusal := _refusal(socket, models)) is not None:
            await socket.send_denial_response(refusal.response())
            return
        await socket.accept("realtime" if "realtime" in socket.scope["subprotocols"] else None)
        client = _Socket(socket, models, limits or Limits())
        if len(open_sessions) >= models.max_sockets:
            message = f"{models.max_sockets} live transcriptions are open; try again later"
            await client.refuse(ApiError(503, message, kind="server_error", code="too_many_sessions"), TOO_MANY)
            return
        open_sessions.add(client)
        try:
            await client.serve(model)
        finally:
            open_sessions.discard(client)

    return router


def _refusal(socket: WebSocket, models: LiveModels) -> ApiError | None:
    """Why a client may not come in; None if it may.

    Where there is no key, pages of other sites are refused by their origin: browsers let any page open any socket.
    """
    if models.api_key is not None:
        if hmac.compare_digest(_key(socket).encode(), models.api_key.encode()):
            return None
        message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
        return ApiError(401, message, code="invalid_api_key")
    origin = socket.headers.get("origin")
    if origin and not {"*", origin} & {*models.origins} and urlsplit(origin).netloc != socket.headers.get("host"):
        return ApiError(403, f"pages of {origin[:100]} may not use this server", code="origin_not_allowed")
    return None


def _key(socket: WebSocket) -> str:
    """The key that a client sent: in a header, as a subprotocol, or in the address."""
    scheme, _, key = socket.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    for name in socket.scope["subprotocols"]:
        if name.startswith(KEY_PROTOCOL):
            return str(name.removeprefix(KEY_PROTOCOL))
    return socket.query_params.get("api_key", "")


class _Socket:
    """One client."""

    def __init__(self, socket: WebSocket, models: LiveModels, limits: Limits):
        self._socket, self._models, self._limits = socket, models, limits
        self._id = f"sess_{secrets.token_hex(8)}"
        self._session = Session()
        self._events: deque[dict[str, Any]] = deque()  # for the client
        self._more, self._over, self._freed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._number = 0  # of the last event
        self._appended_s = 0.0  # since the last commit
        self._too_slow = False

    async def refuse(self, error: AsrError, code: int) -> None:
        """Tells a client why it is let go."""
        self._tell_error(error)
        await self._part(code, str(error))

    async def serve(self, model: str | None) -> None:
        """Serves it until it goes, its session fails, or it does not take its events; then nothing of it is left."""
        try:
            self._name, scheduler = await self._models.live(model)
            self._settings = self._session.settings(scheduler)
        except AsrError as error:
            await self.refuse(error, REFUSED)
            return
        self._tell_session("session.created")
        loop = asyncio.get_running_loop()

        def later(function: Callable[..., None], *values: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(function, *values)

        live = LiveSession(self._settings, partial(later, self._tell), partial(later, self._thread_ended))
        self._models.sessions.add(live)
        tasks = [asyncio.create_task(task) for task in (self._receive(live), self._send(), self._over.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            live.inbox.close()
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            await self._part(REFUSED if self._too_slow else ENDED, "")
            with suppress(TimeoutError):  # a step under way is waited for: the session counts until it has ended
                async with asyncio.timeout(self._limits.send_s):
                    await self._freed.wait()
            self._models.sessions.discard(live)
        for end in ends:
            if isinstance(end, Exception) and not isinstance(end, GONE):
                raise end

    # -- to the client ----------------------------------------------------------------------------------------------

    def _tell(self, event: dict[str, Any]) -> None:
        if event["type"] in CAN_BE_MISSED and len(self._events) >= self._limits.few_events:
            return
        if len(self._events) >= self._limits.events:
            self._too_slow = True
            self._over.set()
            return
        self._number += 1
        self._events.append({"event_id": f"event_{self._number}", **event})
        self._more.set()

    def _tell_error(self, error: AsrError, event_id: str | None = None) -> None:
        told = api_error(error)
        self._tell(error_event(str(told), kind=told.kind, code=told.code, param=told.param, event_id=event_id))

    def _tell_session(self, kind: str) -> None:
        self._tell({"type": kind, "session": self._session.shown(self._id, self._name)})

    async def _send(self) -> None:
        while True:
            while not self._events:
                self._more.clear()
                await self._more.wait()
            await self._send_next()

    async def _send_next(self) -> None:
        text = json.dumps(self._events[0], ensure_ascii=False)
        try:
            async with asyncio.timeout(self._limits.send_s):
                await self._socket.send_text(text)
        except TimeoutError:
            self._too_slow = True
            raise
        self._events.popleft()

    def _thread_ended(self) -> None:
        self._freed.set()
        self._over.set()

    async def _part(self, code: int, reason: str) -> None:
        """Sends what is left and closes the socket, unless the client has gone or takes nothing."""
        reason = reason.encode()[:MAX_REASON].decode(errors="ignore")
        with suppress(*GONE):
            while self._events and not self._too_slow:
                await self._send_next()
            async with asyncio.timeout(self._limits.close_s):
                await self._socket.close(code, reason)

    # -- from the client --------------------------------------------------------------------------------------------

    async def _receive(self, live: LiveSession) -> None:
        while (message := await self._socket.receive())["type"] == "websocket.receive":
            event_id = None
            try:
                event = _event(message.get("text"))
                event_id = str(event["event_id"])[:MAX_ID] if "event_id" in event else None
                await self._take(event, live)
            except AsrError as error:
                self._tell_error(error, event_id)

    async def _take(self, event: dict[str, Any], live: LiveSession) -> None:
        """Does what an event asks for. Raises ApiError where it cannot be done."""
        while live.inbox.waiting_s > self._limits.waiting_s or len(live.inbox) > self._limits.waiting:
            await asyncio.sleep(0.05)
        kind = event.get("type")
        if kind == "input_audio_buffer.append":
            await self._append(event.get("audio"), live)
        elif kind == "input_audio_buffer.commit":
            if self._appended_s < MIN_COMMIT_S:
                message = f"the buffer holds {1000 * self._appended_s:.0f} ms of sound; append at least 100 ms"
                raise bad(message, None, "input_audio_buffer_commit_empty")
            self._appended_s = 0.0
            live.inbox.order("commit")
        elif kind == "input_audio_buffer.clear":
            self._appended_s = 0.0
            live.inbox.order("clear")
        elif kind == "session.update":
            await self._update(event.get("session"), live)
        else:
            raise bad(f"type {str(kind)[:80]!r} is no event of a transcription session", "type", "unknown_event")

    async def _append(self, audio: Any, live: LiveSession) -> None:
        try:
            data = base64.b64decode(audio, validate=True)
        except (TypeError, ValueError):
            raise bad("audio is no base64", "audio", "invalid_audio") from None
        block = self._session.samples(data)
        seconds = len(block) / self._session.rate
        if seconds > self._limits.append_s:
            raise bad(f"{seconds:.0f} s in one event; append at most {self._limits.append_s:.0f} s at a time", "audio")
        if not len(block):
            return
        self._appended_s += seconds
        live.inbox.put(block, seconds)

    async def _update(self, change: Any, live: LiveSession) -> None:
        session = self._session.updated(change)
        try:
            name, scheduler = await self._models.live(session.transcription.model or self._name)
        except ApiError as error:
            where = "session.audio.input.transcription.model" if error.param else None
            raise ApiError(error.status, str(error), kind=error.kind, param=where, code=error.code) from None
        settings = session.settings(scheduler)
        if settings != self._settings:
            live.inbox.order(settings)
        self._session, self._settings, self._name = session, settings, name
        self._tell_session("session.updated")


def _event(text: str | None) -> dict[str, Any]:
    try:
        event = json.loads(text or "")
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise bad("an event is a JSON object in a text message", None, "invalid_event")
    return event
