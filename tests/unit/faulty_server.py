"""A file server on this machine that can be told to fail in every way servers do."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from serving import serving

Answer = Callable[["Request"], None]
Fault = Callable[..., Answer]
"""Makes an answer of the content that should be given and its headers."""


class Request(BaseHTTPRequestHandler):
    """One request, with helpers to answer it."""

    protocol_version = "HTTP/1.1"
    server: FaultyServer  # type: ignore[assignment]

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        answers = self.server.answers.get(self.path, [])
        answer = answers.pop(0) if len(answers) > 1 else (answers[0] if answers else status(404))
        answer(self)

    do_HEAD = do_GET

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def send(self, code: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        """Send a whole answer; ``length`` lies about how long it is."""
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if length is not None:
            self.close_connection = True


class FaultyServer(ThreadingHTTPServer):
    """Answers each path by its list of answers, the last one again and again."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.answers: dict[str, list[Answer]] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error here."""

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def serve(self, path: str, *answers: Answer) -> str:
        """Set the answers of a path; returns its URL."""
        self.answers[path] = list(answers)
        return self.url(path)

    def paths(self) -> list[str]:
        return [path for path, _ in self.seen]


def running() -> AbstractContextManager[FaultyServer]:
    """A server that answers while the block lasts."""
    return serving(FaultyServer())


def content(body: bytes, etag: str = '"one"', ranges: bool = True, **headers: str) -> Answer:
    """The file as an honest server gives it, parts of it where they are asked for."""

    def answer(request: Request) -> None:
        wanted = request.headers.get("Range")
        same = request.headers.get("If-Range", etag) == etag
        tags = {"ETag": etag, **headers} if etag else headers
        if not (wanted and ranges and same):
            return request.send(200, body, **tags)
        first = int(wanted.removeprefix("bytes=").partition("-")[0])
        if first >= len(body):
            return request.send(416, Content_Range=f"bytes */{len(body)}")
        place = f"bytes {first}-{len(body) - 1}/{len(body)}"
        return request.send(206, body[first:], Content_Range=place, **tags)

    return answer


def status(code: int, **headers: str) -> Answer:
    return lambda request: request.send(code, b"no", **headers)


def redirect(to: str, code: int = 302) -> Answer:
    return lambda request: request.send(code, Location=to)


def truncated(body: bytes, after: int, etag: str = '"one"', **headers: str) -> Answer:
    """Promises all of the file and hangs up after some bytes."""
    return lambda request: request.send(200, body[:after], length=len(body), ETag=etag, **headers)


def spliced(body: bytes, etag: str, **headers: str) -> Answer:
    """Gives the part that is asked for of whatever the file is now: does not know If-Range."""

    def answer(request: Request) -> None:
        first = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        place = f"bytes {first}-{len(body) - 1}/{len(body)}"
        request.send(206, body[first:], Content_Range=place, ETag=etag, **headers)

    return answer


def stalled(body: bytes, after: int, seconds: float, etag: str = '"one"', **headers: str) -> Answer:
    """Promises all of the file, sends some bytes and says nothing more."""

    def answer(request: Request) -> None:
        request.send(200, body[:after], length=len(body), ETag=etag, **headers)
        request.wfile.flush()
        time.sleep(seconds)

    return answer


def endless(request: Request) -> None:
    """Sends without saying how much, until the client hangs up."""
    request.send_response(200)
    request.send_header("Connection", "close")
    request.end_headers()
    with suppress(OSError):
        while True:
            request.wfile.write(bytes(1 << 20))
