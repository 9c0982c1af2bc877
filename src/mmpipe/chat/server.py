"""The server on this machine: the page at ``/``, OpenAI's protocol below ``/v1``, ``/health`` and ``/metrics``."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmpipe.chat import api, page
from mmpipe.chat.guard import Access, Budget, Guard
from mmpipe.chat.messages import ChatError
from mmpipe.chat.options import SamplingOptions
from mmpipe.chat.protocol import RETRY_SECONDS, Metrics, RequestError, error_object, handle_error
from mmpipe.errors import MmpipeError

if TYPE_CHECKING:
    from mmpipe.chat.model import ChatModel
    from mmpipe.chat.queue import RequestQueue
    from mmpipe.sources.transfer.public_url import Limits

HOST = "127.0.0.1"
MAX_CONNECTIONS = 256
_NOBODY = Access()


def build(
    models: Mapping[str, ChatModel],
    sampling: SamplingOptions,
    limits: Limits | None = None,
    access: Access = _NOBODY,
    **bounds: Any,
) -> FastAPI:
    """The application for one checkpoint, or two side by side; ``bounds`` are the guard's."""
    app = FastAPI(title="mmpipe", docs_url=None, redoc_url=None, openapi_url=None)
    metrics, budget = Metrics(next(iter(models.values())).queue), bounds.pop("budget", Budget())
    for kind in (MmpipeError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, handle_error)
    app.include_router(api.router(models, sampling, budget, limits))

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    def figures() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    calls = page.mount(app, list(models.values()), sampling)
    app.add_middleware(Guard, access=access, calls=calls, metrics=metrics, budget=budget, **bounds)
    return app


class Protocol(H11Protocol):
    """HTTP with bounds that uvicorn lacks: on connections, on the time of a head, and on that of a slow reader."""

    head_seconds = 10.0
    read_seconds = 30.0
    _head: asyncio.TimerHandle | None = None
    _write: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.write(_raw(503, "too many connections; try again later"))
            transport.close()
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if not self.transport.is_closing():
            super().data_received(data)

    def handle_events(self) -> None:
        """See H11Protocol."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._head = _cancel(self._head)

    def on_response_complete(self) -> None:
        """See H11Protocol."""
        if not self.transport.is_closing():
            self._await_head()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        self._write = self._write or self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        super().resume_writing()
        self._write = _cancel(self._write)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._head, self._write = _cancel(self._head), _cancel(self._write)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """See H11Protocol."""
        self.transport.write(_raw(400, msg))
        self.transport.close()

    def _await_head(self) -> None:
        _cancel(self._head)
        self._head = self.loop.call_later(self.head_seconds, self._late)

    def _late(self) -> None:
        self.transport.write(_raw(408, "the request did not arrive in time"))
        self.transport.close()


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer is not None:
        timer.cancel()
    return None


def _raw(status: int, message: str) -> bytes:
    """A response with an error object, for what is no request yet."""
    body = json.dumps(error_object(RequestError(status, message))[0]).encode()
    head = f"HTTP/1.1 {status} Error\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Retry-After: {RETRY_SECONDS}\r\nConnection: close\r\n\r\n".encode() + body


def configure(app: FastAPI, **settings: Any) -> uvicorn.Config:
    """uvicorn's settings: no WebSockets, no traceback of what a client did."""
    return uvicorn.Config(
        app, log_level="error", http=Protocol, ws="none", server_header=False, timeout_graceful_shutdown=5, **settings
    )


def listen(app: FastAPI, port: int, queue: RequestQueue) -> None:
    """Serve until Ctrl-C. Raises ChatError when the port is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise ChatError(f"port {port} is taken; choose another with --port") from error
    url = f"http://{HOST}:{listener.getsockname()[1]}"
    print(f"{url} is the page, {url}/v1 speaks OpenAI's protocol; Ctrl-C ends it.", flush=True)
    server = _Server(configure(app), queue)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        return
    finally:
        listener.close()


class _Server(uvicorn.Server):
    """Cancels pending answers before it waits for their connections."""

    def __init__(self, config: uvicorn.Config, queue: RequestQueue) -> None:
        super().__init__(config)
        self._queue = queue

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server."""
        self._queue.cancel_all()
        await super().shutdown(sockets)
