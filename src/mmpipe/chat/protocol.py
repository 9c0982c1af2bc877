"""Errors as OpenAI's servers report them, and what the server has counted (``/metrics``)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from mmpipe.chat.queue import QueueFull
from mmpipe.errors import MmpipeError

if TYPE_CHECKING:
    from mmpipe.chat.queue import RequestQueue

RETRY_SECONDS = 5
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class RequestError(MmpipeError):
    """A request that cannot be answered."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def error_object(error: Exception) -> tuple[dict[str, Any], int]:
    """OpenAI's error object, and the HTTP status. Of a fault of the server the client learns no more than that."""
    param = code = None
    message = str(error)
    match error:
        case RequestError():
            status, param, code = error.status, error.param, error.code
        case QueueFull():
            status = 429
        case MmpipeError():
            status = 400
        case HTTPException():
            status, message = error.status_code, str(error.detail)
        case RequestValidationError():
            status = 422
        case _:
            status, message = 500, "the server failed; its log has the reason"
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    # Lone surrogates, which JSON can hold as escapes, are not UTF-8.
    message = message.encode("utf-8", "replace").decode()[:2000]
    param = param and param.encode("utf-8", "replace").decode()[:200]
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}, status


def error_response(error: Exception) -> Response:
    """The response for an error."""
    body, status = error_object(error)
    headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="mmpipe", charset="UTF-8"'
    if isinstance(error, HTTPException) and error.headers:
        headers |= error.headers
    return JSONResponse(body, status, headers)


async def handle_error(_: Request, error: Exception) -> Response:
    """An exception handler of the application."""
    return error_response(error)


class Metrics:
    """Counts of requests by route and status, in the text format of Prometheus."""

    def __init__(self, queue: RequestQueue) -> None:
        self._queue = queue
        self._requests: Counter[tuple[str, int]] = Counter()

    def count(self, route: str, status: int) -> None:
        """Count a request; ``route`` is one of a fixed few."""
        self._requests[route, status] += 1

    def text(self) -> str:
        """All figures."""
        done = self._queue.totals
        errors = sum(count for (_, status), count in self._requests.items() if status >= 400)
        lines = ["# TYPE mmpipe_requests_total counter"]
        lines += [
            f'mmpipe_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self._requests.items())
        ]
        for name, kind, value in (
            ("errors_total", "counter", errors),
            ("queue_length", "gauge", len(self._queue)),
            ("answers_total", "counter", done["answers"]),
            ("failed_answers_total", "counter", done["failed"]),
            ("prompt_tokens_total", "counter", done["prompt_tokens"]),
            ("completion_tokens_total", "counter", done["tokens"]),
            ("answer_seconds_total", "counter", done["seconds"]),
        ):
            lines += [f"# TYPE mmpipe_{name} {kind}", f"mmpipe_{name} {value:g}"]
        return "\n".join(lines) + "\n"
