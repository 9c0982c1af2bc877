"""A local endpoint that answers like an OpenAI-compatible judge, and misbehaves when told to."""

from __future__ import annotations

import json
import threading
import time
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from serving import serving


class Server(ThreadingHTTPServer):
    """Plays the endpoint: ``faults`` are used up one a request, then every request is answered with ``reply``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = "Fine.\nRating: 6"
        self.usage: dict[str, int] = {"total_tokens": 7}
        self.faults: list[Any] = []
        self.seen: list[dict[str, Any]] = []
        self.headers_seen: list[str | None] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(body)
            self.server.headers_seen.append(self.headers.get("Authorization"))
            fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, float):
            time.sleep(fault)
            fault = "hang up"
        if fault == "hang up":
            self.connection.close()
            return
        if isinstance(fault, int):
            self.send_response(fault)
            if fault in (301, 302, 307):
                self.send_header("Location", f"{self.server.url}/elsewhere")
            self.end_headers()
            return
        content = fault if isinstance(fault, str) else self.answer()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content.encode())

    def answer(self) -> str:
        message = {"role": "assistant", "content": self.server.reply}
        return json.dumps({"choices": [{"message": message}], "usage": self.server.usage})

    def log_message(self, *args: Any) -> None:
        pass


def running() -> AbstractContextManager[Server]:
    """A server that answers while the block lasts."""
    return serving(Server())
