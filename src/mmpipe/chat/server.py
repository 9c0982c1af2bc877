"""The server on this machine: the page at ``/``, OpenAI's protocol below ``/v1``."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mmpipe.chat import api, page
from mmpipe.chat.messages import ChatError, Sampling

if TYPE_CHECKING:
    from mmpipe.chat.model import ChatModel
    from mmpipe.chat.queue import Desk
    from mmpipe.sources.transfer.public_url import Limits

HOST = "127.0.0.1"


def build(models: Mapping[str, ChatModel], sampling: Sampling, limits: Limits | None = None) -> FastAPI:
    """The application for one checkpoint, or two side by side."""
    app = FastAPI(title="mmpipe", docs_url=None, redoc_url=None, openapi_url=None)
    # A name of another site that is pointed at this machine (DNS rebinding) gets nothing.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    app.include_router(api.router(models, sampling, limits))
    return page.mount(app, list(models.values()), sampling)


def listen(app: FastAPI, port: int, desk: Desk) -> None:
    """Serve until Ctrl-C. Raises ChatError when the port is taken."""
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((HOST, port))
    except OSError as error:
        opened.close()
        raise ChatError(f"port {port} is taken; choose another with --port") from error
    where = f"http://{HOST}:{opened.getsockname()[1]}"
    print(f"{where} is the page, {where}/v1 speaks OpenAI's protocol; Ctrl-C ends it.", flush=True)
    server = _Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5), desk)
    try:
        server.run(sockets=[opened])
    except KeyboardInterrupt:
        return
    finally:
        opened.close()


class _Server(uvicorn.Server):
    """Stops the answers being made before it waits for their readers."""

    def __init__(self, config: uvicorn.Config, desk: Desk) -> None:
        super().__init__(config)
        self._desk = desk

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server."""
        self._desk.stop()
        await super().shutdown(sockets)
