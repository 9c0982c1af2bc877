"""OpenAI's chat protocol: ``/v1/models`` and ``/v1/chat/completions`` (https://platform.openai.com/docs/api-reference/chat).

What would change an answer and is not offered here is refused, not ignored.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field, ValidationError, field_validator
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool

from mmpipe.chat import images
from mmpipe.chat.messages import Message, Reply, Sampling
from mmpipe.chat.queue import Answer, Busy
from mmpipe.errors import MmpipeError, did_you_mean
from mmpipe.sources.transfer.public_url import Limits

if TYPE_CHECKING:
    from mmpipe.chat.model import ChatModel

BODY = 64 << 20
"""Bytes of a request at most."""
IMAGES = 16
"""Images of a request at most."""
_FINISH = {"stop": "stop", "length": "length", "stopped": "stop"}
# Parameters that say nothing about the answer, and what others may be without changing it.
_WITHOUT_EFFECT = {"user", "metadata", "store", "safety_identifier", "service_tier", "prompt_cache_key"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
}


class _Refused(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Address(BaseModel):
    url: str


class _Part(BaseModel):
    type: Literal["text", "image_url"]
    text: str = ""
    image_url: _Address | None = None


class _Said(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part] | None = None


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Asked(BaseModel, extra="allow"):
    model: str
    messages: list[_Said] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = False
    stream_options: _StreamOptions | None = None

    @field_validator("messages")
    @classmethod
    def _ends_with_a_question(cls, messages: list[_Said]) -> list[_Said]:
        if messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        return messages

    def sampling(self, default: Sampling) -> Sampling:
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "seed": self.seed,
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop and tuple(self.stop),
        }
        return replace(default, **{name: value for name, value in given.items() if value is not None})


def router(models: Mapping[str, ChatModel], default: Sampling, limits: Limits | None = None) -> APIRouter:
    """The routes below ``/v1``; ``default`` is what a request leaves open, ``limits`` hold for images."""
    routes, bounds = APIRouter(prefix="/v1"), limits or Limits()

    @routes.get("/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(name) for name in models]}

    @routes.get("/models/{name:path}")
    def show_model(name: str) -> Response:
        try:
            _model(models, name)
        except _Refused as refused:
            return JSONResponse(refused.body(), refused.status)
        return JSONResponse(_card(name))

    @routes.post("/chat/completions")
    async def complete(request: Request) -> Response:
        try:
            asked = _parse(await _body(request))
            model = _model(models, asked.model)
            messages = await run_in_threadpool(_messages, asked, bounds)
            with _refusing():
                answer = model.answer(messages, asked.sampling(default))
            return await _respond(request, asked, answer)
        except _Refused as refused:
            return JSONResponse(refused.body(), refused.status)

    return routes


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "mmpipe"}


def _model(models: Mapping[str, ChatModel], name: str) -> ChatModel:
    if name not in models:
        message = f"there is no model '{name}'{did_you_mean(name, models)}"
        raise _Refused(404, message, param="model", code="model_not_found")
    return models[name]


async def _body(request: Request) -> bytes:
    # A page of another site can post text without being asked first, but not JSON.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise _Refused(415, "the content type must be application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY:
            raise _Refused(413, f"the request is larger than {BODY} bytes")
    return bytes(body)


def _parse(body: bytes) -> _Asked:
    try:
        asked = _Asked.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"])) or None
        raise _Refused(400, f"{param or 'the request'}: {first['msg']}", param=param) from error
    for name, value in (asked.model_extra or {}).items():
        if name not in _WITHOUT_EFFECT and value and value not in _NEUTRAL.get(name, ()):
            raise _Refused(400, f"'{name}' is not supported", param=name, code="unsupported_parameter")
    return asked


def _messages(asked: _Asked, limits: Limits) -> list[Message]:
    """The messages with their images fetched."""
    shown = sum(part.type == "image_url" for said in asked.messages for part in _parts(said))
    if shown > IMAGES:
        raise _Refused(400, f"{shown} images, at most {IMAGES} are taken", param="messages")
    with _refusing("messages"):
        return [
            Message(
                "system" if said.role == "developer" else said.role,
                tuple(_image(part, limits) if part.type == "image_url" else part.text for part in _parts(said)),
            )
            for said in asked.messages
        ]


def _parts(said: _Said) -> list[_Part]:
    if isinstance(said.content, list):
        return said.content
    return [_Part(type="text", text=said.content)] if said.content else []


def _image(part: _Part, limits: Limits) -> Any:
    if part.image_url is None:
        raise _Refused(400, "an image_url part needs image_url.url", param="messages")
    url = part.image_url.url
    if url[:5].lower() == "data:":
        return images.from_data_url(url, limits.size)
    return images.from_address(url, limits)


class _refusing:
    """Turns errors of ours into refusals."""

    def __init__(self, param: str | None = None) -> None:
        self._param = param

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, MmpipeError):
            status = 429 if isinstance(error, Busy) else 400
            raise _Refused(status, str(error), param=self._param) from error


async def _respond(request: Request, asked: _Asked, answer: Answer) -> Response:
    pieces = iterate_in_threadpool(iter(answer))
    watch = asyncio.create_task(_stop_when_left(request, answer))
    try:
        first = await _next(pieces)  # what is wrong with a request is found before anything is sent
        facts = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        if asked.stream:
            events = _events(facts, asked, answer, first, pieces)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        while await _next(pieces) is not None:
            pass
    finally:
        watch.cancel()
    reply = answer.reply
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": reply.text, "refusal": None},
        "logprobs": None,
        "finish_reason": _FINISH[reply.finish],
    }
    return JSONResponse({**facts, "object": "chat.completion", "choices": [choice], "usage": _usage(reply)})


async def _stop_when_left(request: Request, answer: Answer) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)
    answer.stop()


async def _next(pieces: AsyncIterator[str]) -> str | None:
    with _refusing():
        return await anext(pieces, None)


async def _events(
    facts: dict[str, Any], asked: _Asked, answer: Answer, first: str | None, rest: AsyncIterator[str]
) -> AsyncIterator[str]:
    """The answer as server-sent events; a reader who leaves stops it."""

    def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return _event({**facts, "object": "chat.completion.chunk", "choices": [choice]})

    try:
        yield chunk({"role": "assistant", "content": ""})
        piece = first
        while piece is not None:
            yield chunk({"content": piece})
            piece = await _next(rest)
        reply = answer.reply
        yield chunk({}, _FINISH[reply.finish])
        if asked.stream_options and asked.stream_options.include_usage:
            yield _event({**facts, "object": "chat.completion.chunk", "choices": [], "usage": _usage(reply)})
        yield "data: [DONE]\n\n"
    except _Refused as refused:
        yield _event(refused.body())
    finally:
        answer.stop()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _usage(reply: Reply) -> dict[str, int]:
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.tokens,
        "total_tokens": reply.prompt_tokens + reply.tokens,
    }
