"""OpenAI's chat protocol (https://platform.openai.com/docs/api-reference/chat): ``/v1/models``, ``/v1/chat/completions``.

Parameters that would change an answer and are not offered here are refused, not ignored.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field, ValidationError, field_validator
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool

from mmpipe.chat import images
from mmpipe.chat.messages import Completion, Message
from mmpipe.chat.options import MAX_STOP, MAX_TOKENS, SamplingOptions
from mmpipe.chat.protocol import RequestError, error_object
from mmpipe.chat.queue import AnswerStream
from mmpipe.errors import MmpipeError, did_you_mean
from mmpipe.settings import findings
from mmpipe.sources.transfer.public_url import Limits

if TYPE_CHECKING:
    from mmpipe.chat.guard import Budget
    from mmpipe.chat.model import ChatModel

MAX_IMAGES = 16  # of a request
MAX_MESSAGES = 1024  # and parts of them, of a request
MAX_DOWNLOADS = 32 << 20  # bytes of all images of a request that are downloaded
_DOWNLOAD_SECONDS = 30.0
_MAX_VALUES = 20_000  # of the JSON of a request: each takes much more memory than its characters
# A string, or the rest where it does not end: no part is read twice.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_FINISH = {"stop": "stop", "length": "length", "stopped": "stop"}
# Parameters without effect on the answer, and values of others that do not change it.
_WITHOUT_EFFECT = {"user", "metadata", "store", "safety_identifier", "service_tier", "prompt_cache_key"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
}


_Stop = Annotated[str, Field(max_length=MAX_STOP)]


class _ImageUrl(BaseModel):
    url: str


class _ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: _ImageUrl

    @field_validator("image_url", mode="before")
    @classmethod
    def _is_an_object(cls, value: Any) -> Any:
        if not isinstance(value, dict | _ImageUrl):
            raise ValueError('an object with \'url\' is expected, such as {"url": "https://... or data:image/..."}')
        return value


class _TextPart(BaseModel):
    type: Literal["text"]
    text: str = ""


class _RequestMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[_ImagePart | _TextPart, Field(discriminator="type")]] = Field([], max_length=MAX_MESSAGES)

    @field_validator("content", mode="before")
    @classmethod
    def _text_is_a_part(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) and content else content or []


class _ChatRequest(BaseModel, extra="allow"):
    model: str
    messages: list[_RequestMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stream: bool | None = False
    stream_options: dict[str, bool] | None = None

    def sampling(self, default: SamplingOptions) -> SamplingOptions:
        given = self.model_dump(include={"temperature", "top_p", "seed"}, exclude_none=True)
        if limit := self.max_completion_tokens or self.max_tokens:
            given["max_tokens"] = limit
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return replace(default, **given)


def router(
    models: Mapping[str, ChatModel], default: SamplingOptions, budget: Budget, limits: Limits | None = None
) -> APIRouter:
    """The routes below ``/v1``; ``default`` is used where a request sets nothing, ``limits`` hold for images,
    ``budget`` for the memory of downloads.

    They raise MmpipeError; the application answers it with ``protocol.handle_error``.
    """
    routes, bounds = APIRouter(prefix="/v1"), limits or Limits()

    @routes.get("/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(name) for name in models]}

    @routes.get("/models/{name:path}")
    def show_model(name: str) -> dict[str, Any]:
        _model(models, name)
        return _card(name)

    @routes.post("/chat/completions")
    async def complete(request: Request) -> Response:
        asked = await run_in_threadpool(_parse, await _body(request))
        model, sampling = _model(models, asked.model), asked.sampling(default)
        urls = [part.image_url.url[:8] for m in asked.messages for part in m.content if isinstance(part, _ImagePart)]
        if len(urls) > MAX_IMAGES:
            raise RequestError(400, f"{len(urls)} images, at most {MAX_IMAGES} are taken", param="messages")
        place = model.queue.take_place()
        try:
            with budget.take(MAX_DOWNLOADS if any(map(images.is_address, urls)) else 0):
                messages = await run_in_threadpool(_messages, asked, bounds)
            asked.messages.clear()  # the encoded images with them
            answer = model.answer(messages, sampling, place)
            del messages
        except BaseException:
            model.queue.leave(place)
            raise
        return await _respond(request, asked, answer)

    return routes


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "mmpipe"}


def _model(models: Mapping[str, ChatModel], name: str) -> ChatModel:
    if name not in models:
        message = f"there is no model '{name}'{did_you_mean(name, models)}"
        raise RequestError(404, message, param="model", code="model_not_found")
    return models[name]


async def _body(request: Request) -> bytes:
    # A page of another site can post text without asking first (CORS), but not JSON.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise RequestError(415, "the content type must be application/json")
    return b"".join([chunk async for chunk in request.stream()])  # bounded by the guard; not kept by the request


def _parse(body: bytes) -> _ChatRequest:
    strings = body.count(b'"') - body.count(b'\\"')  # at least; before they are taken out one by one
    if strings > 4 * _MAX_VALUES or sum(map(_STRING.sub(b"", body).count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise RequestError(400, f"a request of more than {_MAX_VALUES} values")
    try:
        asked = _ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = findings(error, _loads(body))[0]
        param = ".".join(map(str, first["loc"])) or None
        raise RequestError(400, f"{param or 'the request'}: {_told(first)}", param=param) from error
    if asked.messages[-1].role != "user":
        raise RequestError(400, "messages: the last message must be the user's", param="messages")
    for name, value in (asked.model_extra or {}).items():
        if name not in _WITHOUT_EFFECT and value and value not in _NEUTRAL.get(name, ()):
            raise RequestError(400, f"'{name}' is not supported", param=name, code="unsupported_parameter")
    return asked


def _loads(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _told(finding: Mapping[str, Any]) -> str:
    """A finding of pydantic in the words of the protocol."""
    match finding["type"]:
        case "union_tag_invalid":
            facts = finding["ctx"]
            return f"the type '{facts['tag']}' is not supported; known: {facts['expected_tags'].replace(chr(39), '')}"
        case "union_tag_not_found":
            return "a part of a message needs a 'type', text or image_url"
        case "model_type" | "model_attributes_type":
            return 'an object is expected: a part of a message, such as {"type": "text", "text": "..."}'
        case _:
            return str(finding["msg"]).removeprefix("Value error, ")


def _messages(asked: _ChatRequest, limits: Limits) -> list[Message]:
    """The messages with their images downloaded; nothing is decoded. In a thread, in a place of the queue."""
    end, left = time.monotonic() + _DOWNLOAD_SECONDS, MAX_DOWNLOADS

    def image(part: _ImagePart) -> images.EncodedImage:
        nonlocal left
        url = part.image_url.url
        if url[:5].lower() == "data:":
            return images.from_data_url(url, limits.size)
        seconds = max(0.01, min(limits.seconds, end - time.monotonic()))
        found = images.download(url, replace(limits, size=min(limits.size, left), seconds=seconds))
        left -= len(found.read())
        return found

    try:
        return [
            Message(
                "system" if message.role == "developer" else message.role,
                tuple(part.text if isinstance(part, _TextPart) else image(part) for part in message.content),
            )
            for message in asked.messages
        ]
    except MmpipeError as error:
        raise RequestError(400, str(error), param="messages") from error


async def _respond(request: Request, asked: _ChatRequest, answer: AnswerStream) -> Response:
    pieces = iterate_in_threadpool(iter(answer))
    watch = asyncio.create_task(_cancel_when_disconnected(request, answer))
    try:
        first = await anext(pieces, None)  # an error is found before anything is sent
        facts = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        if asked.stream:
            events = _events(facts, asked, answer, first, pieces)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        async for _ in pieces:
            pass
    finally:
        watch.cancel()
    done = answer.completion
    message = {"role": "assistant", "content": done.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _FINISH[done.finish]}
    return JSONResponse({**facts, "object": "chat.completion", "choices": [choice], "usage": _usage(done)})


async def _cancel_when_disconnected(request: Request, answer: AnswerStream) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)
    answer.cancel()


async def _events(
    facts: dict[str, Any], asked: _ChatRequest, answer: AnswerStream, first: str | None, rest: AsyncIterator[str]
) -> AsyncIterator[str]:
    """The answer as server-sent events; a client that disconnects cancels it."""

    def event(content: dict[str, Any]) -> str:
        return f"data: {json.dumps(content)}\n\n"

    def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**facts, "object": "chat.completion.chunk", "choices": [choice]})

    try:
        yield chunk({"role": "assistant", "content": ""})
        piece = first
        while piece is not None:
            yield chunk({"content": piece})
            piece = await anext(rest, None)
        done = answer.completion
        yield chunk({}, _FINISH[done.finish])
        if (asked.stream_options or {}).get("include_usage"):
            yield event({**facts, "object": "chat.completion.chunk", "choices": [], "usage": _usage(done)})
        yield "data: [DONE]\n\n"
    except MmpipeError as error:
        yield event(error_object(error)[0])
    finally:
        answer.cancel()


def _usage(done: Completion) -> dict[str, int]:
    total = done.prompt_tokens + done.tokens
    return {"prompt_tokens": done.prompt_tokens, "completion_tokens": done.tokens, "total_tokens": total}
