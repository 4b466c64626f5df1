"""Errors as OpenAI's API tells them, whatever went wrong: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import AsrError, AudioError
from .requests import Busy, Closed, Failed

AGAIN_S = 1  # after which a client that was turned away may try again


class ApiError(AsrError):
    """What a client is told.

    Attributes:
        status: of HTTP.
        kind: OpenAI's `type`.
        param: the field that is wrong.
        code: a name of what happened, for programs.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code, self.retry_after = status, kind, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """What OpenAI's API would answer."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def unavailable(message: str, code: str) -> ApiError:
    """The server cannot answer now."""
    return ApiError(503, message, kind="server_error", code=code, retry_after=AGAIN_S)


def busy(message: str) -> ApiError:
    """Too many want something at once."""
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", retry_after=AGAIN_S)


def api_error(error: AsrError) -> ApiError:
    """What a client is told of an error of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return busy(str(error))
    if isinstance(error, Closed):
        return unavailable(str(error), "shutting_down")
    if isinstance(error, Failed):
        return ApiError(500, str(error), kind="server_error", code="model_failed")
    if isinstance(error, AudioError):
        return ApiError(400, str(error), param="file", code="invalid_audio")
    return ApiError(400, str(error))


def install(app: FastAPI) -> None:
    """Lets an app answer all its errors so, FastAPI's own included."""

    @app.exception_handler(AsrError)
    async def ours(request: Request, error: AsrError) -> JSONResponse:
        return api_error(error).response()

    @app.exception_handler(HTTPException)
    async def of_starlette(request: Request, error: HTTPException) -> JSONResponse:
        message = error.detail
        if error.status_code == HTTPStatus.NOT_FOUND and message == "Not Found":
            message = f"there is no {request.method} {request.url.path} here; /docs lists what there is"
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            message = f"{request.method} is not possible for {request.url.path}"
        response = ApiError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def of_fastapi(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return ApiError(400, f"{param}: {first['msg']}", param=param or None).response()

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "the server failed; its log says why", kind="server_error", code="internal_error").response()
