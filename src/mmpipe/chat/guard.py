"""What every request passes before anything is done for it: host, origin, token, route, size and time.

Of gradio's routes only those of the page are reachable. Uploads and files are served here, not by gradio, and a body for
gradio is rebuilt from what was validated: no path, address or component that the page does not send reaches it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ctypes
import hmac
import json
import mimetypes
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request

from mmpipe.chat.protocol import Metrics, RequestError, error_response
from mmpipe.chat.uploads import MAX_FILES, Uploads, parse_upload
from mmpipe.errors import MmpipeError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ("127.0.0.1", "localhost", "[::1]")
_LIBC = ctypes.CDLL(None)
_Model = TypeVar("_Model", bound=BaseModel)
_COOKIE = "mmpipe_session"
_MB = 1 << 20
_MAX_BODY = {"/v1/chat/completions": 32 * _MB, "/gradio_api/upload": 64 * _MB}
_MAX_OTHER_BODY = 4 * _MB
_SESSION = r"[A-Za-z0-9_-]{1,64}"
_READ = re.compile(
    r"/|/config|/favicon\.ico|/robots\.txt|/manifest\.json|(/gradio_api)?/theme\.css|/(assets|static)/[\w./ @+-]+"
    rf"|/gradio_api/(startup-events|queue/data|upload_progress|heartbeat/{_SESSION}|file=.+)"
)
_WRITTEN = re.compile(r"/gradio_api/(queue/join|cancel|reset|upload)")
_API = {"/v1/chat/completions": ("POST",), "/v1/models": ("GET",), "/health": ("GET",), "/metrics": ("GET",)}


@dataclass(frozen=True)
class Access:
    """Who may ask: host names the server answers to, and the token to be shown (None: none is asked for)."""

    hosts: Collection[str] = ()
    """Besides those of this machine; behind a proxy, its public name."""
    token: str | None = field(default=None, repr=False)

    def allows_host(self, host: str) -> bool:
        """Whether ``host`` (with or without port) is a name of this server."""
        name = re.sub(r":\d{1,5}$", "", host.lower())
        return name in HOSTS or name in self.hosts

    def allows_origin(self, origin: str, host: str) -> bool:
        """Whether a page of ``origin`` is this server's own."""
        place = urlsplit(origin.lower()).netloc
        return origin.lower().startswith(("http://", "https://")) and (place == host.lower() or place in self.hosts)

    def allows(self, authorization: str) -> bool:
        """Whether the header shows the token: as a bearer, or as the password that a browser asks for."""
        if self.token is None:
            return True
        kind, _, shown = authorization.strip().partition(" ")
        if kind.lower() == "basic":
            try:
                shown = base64.b64decode(shown, validate=True).decode("utf-8", "replace").partition(":")[2]
            except (binascii.Error, ValueError):
                return False
        elif kind.lower() != "bearer":
            return False
        return hmac.compare_digest(shown.strip().encode("utf-8", "replace"), self.token.encode())


class Budget:
    """Bytes that all open requests may hold together."""

    def __init__(self, size: int = 160 * _MB) -> None:
        self._free = size

    @contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Hold ``size`` bytes. Raises RequestError when they are not free."""
        if size > self._free:
            raise RequestError(503, "too many large requests at once; try again later")
        self._free -= size
        try:
            yield
        finally:
            self._free += size
            if size >= _MB:
                _release_memory()


def _release_memory() -> None:
    """Give freed memory back to the system: glibc keeps that of large requests, scattered over its threads' heaps."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


class _File(BaseModel):
    path: str = Field(max_length=500)


class _Box(BaseModel):
    text: str = Field("", max_length=1_000_000)
    files: list[_File] = Field([], max_length=MAX_FILES)


class _Join(BaseModel):
    data: list[Any] = Field(max_length=16)
    fn_index: int
    session_hash: Annotated[str, Field(pattern=rf"^{_SESSION}$")]
    trigger_id: int | None = Field(None, ge=0, le=1 << 31)


class _Settings(BaseModel):
    temperature: float = Field(ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(gt=0, le=1, allow_inf_nan=False)
    max_tokens: float = Field(ge=1, le=1 << 20, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(1 << 53), le=1 << 53)


class _Cancel(BaseModel):
    session_hash: Annotated[str, Field(pattern=rf"^{_SESSION}$")]
    fn_index: int = Field(ge=0, le=1 << 31)
    event_id: str = Field(max_length=64)


class _Reset(BaseModel):
    event_id: str = Field(max_length=64)


@dataclass(frozen=True)
class PageCalls:
    """What the page may call: the function that takes a question, those without inputs, and the open sessions."""

    question: int
    others: Collection[int]
    has_session: Callable[[str], bool]


class Guard:
    """ASGI middleware. ``idle`` and ``whole`` bound the seconds between two pieces of a body, and to its end."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        calls: PageCalls,
        metrics: Metrics,
        budget: Budget,
        uploads: Uploads | None = None,
        idle: float = 10,
        whole: float = 120,
    ) -> None:
        self.app, self.access, self.calls, self.metrics, self.budget = app, access, calls, metrics, budget
        self.uploads = uploads or Uploads()
        self._idle, self._whole = idle, whole

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        request, started = Request(scope, receive), False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start" and not started:
                started = True
                self.metrics.count(_route(scope["path"]), message["status"])
            await send(message)

        try:
            owner = self._admit(request)
            await self._serve(request, owner, counted)
        except (MmpipeError, HTTPException) as error:
            if not started:
                await error_response(error)(scope, receive, counted)
        except _Gone:
            pass

    def _admit(self, request: Request) -> str:
        """The owner of the request's uploads. Raises RequestError when it must not be answered."""
        headers = request.headers
        host = headers.get("host", "")
        if any(not self.access.allows_host(name) for name in [host, *headers.getlist("x-forwarded-host")]):
            raise RequestError(400, "this server does not answer to that host name (mmpipe serve --allow-host)")
        origin = headers.get("origin")
        foreign = origin is not None and not self.access.allows_origin(origin, host)
        followed = request.method == "GET" and request.url.path == "/" and headers.get("sec-fetch-mode") == "navigate"
        if foreign or (headers.get("sec-fetch-site") in ("cross-site", "same-site") and not followed):
            raise RequestError(403, "a page of another site may not use this server")
        path = request.url.path
        if path != "/health" and not self.access.allows(headers.get("authorization", "")):
            raise RequestError(401, "the token is missing or wrong (Authorization: Bearer …)", code="invalid_api_key")
        if request.method not in (methods := _methods(path)):
            allowed = {"Allow": ", ".join(methods)}
            raise HTTPException(405, "this address does not take that method", headers=allowed)
        given = request.cookies.get(_COOKIE, "")
        return given if re.fullmatch(r"[0-9a-f]{32}", given) else ""

    async def _serve(self, request: Request, owner: str, send: Send) -> None:
        scope, path = request.scope, request.scope["path"]
        limit = _MAX_BODY.get(path, _MAX_OTHER_BODY)
        with self.budget.take(_expected_size(request, limit)):
            body = await self._body(request, limit)
            if response := await self._own_answer(request, owner, body):
                return await response(scope, request.receive, send)
            if _is_api(path):
                replayed = _replay(body, request.receive)
                del body  # the application frees it when it is parsed
                return await self.app(scope, replayed, send)
            query, body = self._checked(request, owner, body)
            headers = [pair for pair in scope["headers"] if pair[0] not in _REWRITTEN]
            headers.append((b"content-length", str(len(body)).encode()))
            inner = {**scope, "query_string": query, "headers": headers}
            if not owner:
                owner = secrets.token_hex(16)
                send = _set_cookie(send, owner)
            await self.app(inner, _replay(body, request.receive), _as_openai(send, inner, request.receive))

    async def _body(self, request: Request, limit: int) -> bytes:
        body, end = bytearray(), time.monotonic() + self._whole
        while True:
            try:
                left = min(self._idle, end - time.monotonic())
                message = await asyncio.wait_for(request.receive(), max(0.01, left))
            except TimeoutError as error:
                raise RequestError(408, "the request did not arrive in time") from error
            if message["type"] == "http.disconnect":
                raise _Gone
            body += message.get("body", b"")
            if len(body) > limit:
                raise RequestError(413, f"the request is larger than {limit} bytes")
            if not message.get("more_body"):
                return bytes(body)

    async def _own_answer(self, request: Request, owner: str, body: bytes) -> Response | None:
        """The response of the routes that gradio does not see."""
        path = request.scope["path"]
        if path == "/gradio_api/upload_progress":
            return PlainTextResponse('data: {"msg": "done"}\n\n', media_type="text/event-stream")
        if path.startswith("/gradio_api/file="):
            file = self.uploads.find(owner, path.removeprefix("/gradio_api/file="))
            kind = mimetypes.guess_type(file.name)[0] or ""
            media = kind if kind in ("image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp") else None
            safe = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox"}
            return FileResponse(file, media_type=media or "application/octet-stream", headers=safe)
        if path == "/gradio_api/upload":
            owner, new = (owner, False) if owner else (secrets.token_hex(16), True)
            files = await parse_upload(request.headers, body)
            paths = [await run_in_threadpool(self.uploads.save, owner, name, content) for name, content in files]
            response = JSONResponse(paths)
            if new:
                response.set_cookie(_COOKIE, owner, httponly=True, samesite="strict")
            return response
        return None

    def _checked(self, request: Request, owner: str, body: bytes) -> tuple[bytes, bytes]:
        """The query and the body that gradio gets."""
        path = request.scope["path"]
        if path == "/gradio_api/queue/data":
            session = parse_qs(request.scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
            if not re.fullmatch(_SESSION, session) or not self.calls.has_session(session):
                raise RequestError(404, "there is no such session")
            return f"session_hash={session}".encode(), b""
        if path == "/gradio_api/queue/join":
            return b"", json.dumps(self._question(_validated(_Join, body), owner)).encode()
        if path in ("/gradio_api/cancel", "/gradio_api/reset"):
            kind = _Cancel if path.endswith("cancel") else _Reset
            return b"", _validated(kind, body).model_dump_json().encode()
        return b"", b""

    def _question(self, join: _Join, owner: str) -> dict[str, Any]:
        if join.fn_index == self.calls.question and len(join.data) == 6:
            box = _validated(_Box, join.data[0])
            found = [str(self.uploads.find(owner, file.path)) for file in box.files]
            files = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in found]
            names = ("temperature", "top_p", "max_tokens", "seed")
            settings = _validated(_Settings, dict(zip(names, join.data[2:], strict=True)))
            text = box.text.encode("utf-8", "replace").decode()
            data = [{"text": text, "files": files}, None, *(getattr(settings, name) for name in names)]
        elif join.fn_index in self.calls.others:
            data = []
        else:
            raise RequestError(422, "this is no question of the page", param="fn_index")
        return {**join.model_dump(), "data": data}


class _Gone(Exception):
    """The client left before the end of its request."""


# What gradio must not read from a client: the length is set anew, the rest names other servers or users.
_REWRITTEN = {
    b"content-length",
    b"transfer-encoding",
    b"x-direct-url",
    b"x-gradio-server",
    b"x-gradio-user",
    b"referer",
}


def _is_api(path: str) -> bool:
    return path in _API or path.startswith("/v1/models/")


def _methods(path: str) -> tuple[str, ...]:
    """The methods of a route. Raises RequestError when there is none."""
    if _is_api(path):
        return _API.get(path, ("GET",))
    if ".." not in path and "\0" not in path:
        if _WRITTEN.fullmatch(path):
            return ("POST",)
        if _READ.fullmatch(path):
            return ("GET", "HEAD")
    raise RequestError(404, "there is nothing at this address")


def _expected_size(request: Request, limit: int) -> int:
    told = request.headers.get("content-length", "")
    if told.isdigit() and len(told) < 20:
        if int(told) > limit:
            raise RequestError(413, f"the request is larger than {limit} bytes")
        return int(told)
    return limit if "transfer-encoding" in request.headers else 0


def _validated(kind: type[_Model], value: Any) -> _Model:
    try:
        return kind.model_validate_json(value) if isinstance(value, bytes) else kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        raise RequestError(422, f"{param or 'the request'}: {first['msg']}", param=param) from error


def _replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` that begins with a body read already."""
    rest: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return rest.pop() if rest else await receive()

    return replayed


def _set_cookie(send: Send, owner: str) -> Send:
    cookie = f"{_COOKIE}={owner}; HttpOnly; Path=/; SameSite=Strict".encode()

    async def with_cookie(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), (b"set-cookie", cookie)]}
        await send(message)

    return with_cookie


def _as_openai(send: Send, scope: Mapping[str, Any], receive: Receive) -> Send:
    """``send`` that puts an error object in place of gradio's own errors."""
    refused = False

    async def translated(message: Message) -> None:
        nonlocal refused
        if message["type"] == "http.response.start" and message["status"] >= 400:
            refused = True
            status = message["status"]
            error = RequestError(status, "the page refused this" if status < 500 else "the page failed; try again")
            await error_response(error)(dict(scope), receive, send)
        elif not refused:
            await send(message)

    return translated


def _route(path: str) -> str:
    """The name of a route in the metrics."""
    if path in ("/", "/health", "/metrics", "/v1/models", "/v1/chat/completions"):
        return path
    return "/v1" if path.startswith("/v1") else "page"
