"""The server on this machine: the page at ``/``, OpenAI's protocol below ``/v1``."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mmpipe.chat import api, page
from mmpipe.chat.messages import ChatError
from mmpipe.chat.options import SamplingOptions
from mmpipe.errors import MmpipeError

if TYPE_CHECKING:
    from mmpipe.chat.model import ChatModel
    from mmpipe.chat.queue import RequestQueue
    from mmpipe.sources.transfer.public_url import Limits

HOST = "127.0.0.1"


def build(models: Mapping[str, ChatModel], sampling: SamplingOptions, limits: Limits | None = None) -> FastAPI:
    """The application for one checkpoint, or two side by side."""
    app = FastAPI(title="mmpipe", docs_url=None, redoc_url=None, openapi_url=None)
    # Other host names that resolve to this machine (DNS rebinding) are refused.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    app.add_exception_handler(MmpipeError, api.error_response)
    app.include_router(api.router(models, sampling, limits))
    return page.mount(app, list(models.values()), sampling)


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
    server = _Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5), queue)
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
