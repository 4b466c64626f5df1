"""What every HTTP request passes first: the key, the size of what is uploaded, how long that takes, and the counters."""

from __future__ import annotations

import asyncio
import hmac
import time
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, unavailable
from .metrics import Metrics
from .models import Models

LINGER_S = 2.0  # a client that is refused may go on to send for so long: cut off at once it would not see the answer
LINGER_BYTES = 32_000_000
CLIENT_GONE = 499  # as nginx has it


class Gate:
    """ASGI middleware.

    Args:
        app: what is behind it.
        models: of the server.
        metrics: in which requests are counted.
    """

    def __init__(self, app: ASGIApp, models: Models, metrics: Metrics):
        self.app, self.models, self.metrics = app, models, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "websocket":
            self.models.sockets += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self.models.sockets -= 1
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        else:
            exchange = _Exchange(scope, receive, send, self.models)
            try:
                if (error := self._refusal(scope)) is not None:
                    await error.response()(scope, exchange.receive, exchange.send)
                else:
                    await self.app(scope, exchange.receive, exchange.send)
            except Exception:
                exchange.broken()  # what answers it stands outside
                raise
            finally:
                self.metrics.count(scope, exchange.status, time.monotonic() - exchange.began)

    def _refusal(self, scope: Scope) -> ApiError | None:
        """Why a request is not let in; None if it is."""
        path, headers, settings = scope["path"], Headers(scope=scope), self.models.settings
        if settings.api_key is not None and (path.startswith("/v1/") or path == "/metrics"):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), settings.api_key.encode()):
                message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
                return ApiError(401, message, code="invalid_api_key")
        if self.models.draining and path.startswith("/v1/audio"):
            return unavailable("the server is shutting down; try again later", "shutting_down")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > settings.max_upload:
            return too_large(settings.max_upload_mb)
        return None


def too_large(limit_mb: float) -> ApiError:
    """An upload is."""
    return ApiError(413, f"the upload is larger than {limit_mb:g} MB; send a smaller file", param="file", code="too_large")


class _Exchange:
    """One request and its answer, as they pass.

    Attributes:
        began: on the monotonic clock.
        status: of the answer; `CLIENT_GONE` where none was sent since the client had gone.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, models: Models):
        self._receive, self._send, self._settings = receive, send, models.settings
        self.began, self.status = time.monotonic(), CLIENT_GONE
        self._size = 0
        headers = Headers(scope=scope)
        self._complete = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
        self._refused = False

    def broken(self) -> None:
        """Notes that the application failed before it answered."""
        if self.status == CLIENT_GONE:
            self.status = HTTPStatus.INTERNAL_SERVER_ERROR

    async def receive(self) -> Message:
        """The next piece of the upload, as long as it comes in time and is not too much."""
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self._settings.body_wait_s):
                message = await self._receive()
        except TimeoutError:
            self._refused = True
            raise ApiError(408, f"nothing of the upload came for {self._settings.body_wait_s:g} s", code="timeout") from None
        self._note(message)
        if self._size > self._settings.max_upload:
            raise too_large(self._settings.max_upload_mb)
        return message

    async def send(self, message: Message) -> None:
        """Passes the answer on; behind it takes in what is still being sent."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.status >= HTTPStatus.BAD_REQUEST and not self._complete:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        elif message["type"] == "http.response.body" and not message.get("more_body") and not self._complete:
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    def _note(self, message: Message) -> None:
        self._size += len(message.get("body", b""))
        self._complete = message["type"] == "http.disconnect" or not message.get("more_body", False)

    async def _linger(self) -> None:
        ends, most = time.monotonic() + LINGER_S, self._size + LINGER_BYTES
        while not (self._complete or self._refused) and self._size < most and (left := ends - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left):
                    self._note(await self._receive())
            except TimeoutError:
                return
