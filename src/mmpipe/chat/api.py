"""OpenAI's chat protocol (https://platform.openai.com/docs/api-reference/chat): ``/v1/models``, ``/v1/chat/completions``.

Parameters that would change an answer and are not offered here are refused, not ignored.
"""

from __future__ import annotations

import asyncio
import json
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
from mmpipe.chat.options import SamplingOptions
from mmpipe.chat.queue import AnswerStream, QueueFull
from mmpipe.errors import MmpipeError, did_you_mean
from mmpipe.settings import findings
from mmpipe.sources.transfer.public_url import Limits

if TYPE_CHECKING:
    from PIL import Image

    from mmpipe.chat.model import ChatModel

MAX_BODY = 64 << 20  # bytes of a request
MAX_IMAGES = 16  # of a request
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


class _RequestError(MmpipeError):
    """A request that cannot be answered."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


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
    content: list[Annotated[_ImagePart | _TextPart, Field(discriminator="type")]] = []

    @field_validator("content", mode="before")
    @classmethod
    def _text_is_a_part(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) and content else content or []


class _ChatRequest(BaseModel, extra="allow"):
    model: str
    messages: list[_RequestMessage] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = False
    stream_options: dict[str, bool] | None = None

    def sampling(self, default: SamplingOptions) -> SamplingOptions:
        given = self.model_dump(include={"temperature", "top_p", "seed"}, exclude_none=True)
        if limit := self.max_completion_tokens or self.max_tokens:
            given["max_tokens"] = limit
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return replace(default, **given)


def router(models: Mapping[str, ChatModel], default: SamplingOptions, limits: Limits | None = None) -> APIRouter:
    """The routes below ``/v1``; ``default`` is used where a request sets nothing, ``limits`` hold for images.

    They raise MmpipeError; the application answers it with :func:`error_response`.
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
        asked = _parse(await _body(request))
        model = _model(models, asked.model)
        messages = await run_in_threadpool(_messages, asked, bounds)
        return await _respond(request, asked, model.answer(messages, asked.sampling(default)))

    return routes


async def error_response(_: Request, error: Exception) -> Response:
    """An error as OpenAI's servers report it."""
    body, status = _error(error)
    return JSONResponse(body, status)


def _error(error: Exception) -> tuple[dict[str, Any], int]:
    """OpenAI's error object, and the HTTP status."""
    refused = error if isinstance(error, _RequestError) else _RequestError(400, str(error))
    status = 429 if isinstance(error, QueueFull) else refused.status
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": refused.param, "code": refused.code}}, status


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "mmpipe"}


def _model(models: Mapping[str, ChatModel], name: str) -> ChatModel:
    if name not in models:
        message = f"there is no model '{name}'{did_you_mean(name, models)}"
        raise _RequestError(404, message, param="model", code="model_not_found")
    return models[name]


async def _body(request: Request) -> bytes:
    # A page of another site can post text without asking first (CORS), but not JSON.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise _RequestError(415, "the content type must be application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise _RequestError(413, f"the request is larger than {MAX_BODY} bytes")
    return bytes(body)


def _parse(body: bytes) -> _ChatRequest:
    try:
        asked = _ChatRequest.model_validate_json(body)
    except ValidationError as error:
        broken = error.errors()[0]["type"] == "json_invalid"
        first = findings(error, None if broken else json.loads(body))[0]
        param = ".".join(map(str, first["loc"])) or None
        raise _RequestError(400, f"{param or 'the request'}: {_told(first)}", param=param) from error
    if asked.messages[-1].role != "user":
        raise _RequestError(400, "messages: the last message must be the user's", param="messages")
    for name, value in (asked.model_extra or {}).items():
        if name not in _WITHOUT_EFFECT and value and value not in _NEUTRAL.get(name, ()):
            raise _RequestError(400, f"'{name}' is not supported", param=name, code="unsupported_parameter")
    return asked


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
    """The messages with their images downloaded and decoded."""
    count = sum(isinstance(part, _ImagePart) for message in asked.messages for part in message.content)
    if count > MAX_IMAGES:
        raise _RequestError(400, f"{count} images, at most {MAX_IMAGES} are taken", param="messages")
    try:
        return [
            Message(
                "system" if message.role == "developer" else message.role,
                tuple(part.text if isinstance(part, _TextPart) else _image(part, limits) for part in message.content),
            )
            for message in asked.messages
        ]
    except MmpipeError as error:
        raise _RequestError(400, str(error), param="messages") from error


def _image(part: _ImagePart, limits: Limits) -> Image.Image:
    url = part.image_url.url
    return images.from_data_url(url, limits.size) if url[:5].lower() == "data:" else images.from_address(url, limits)


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
        yield event(_error(error)[0])
    finally:
        answer.cancel()


def _usage(done: Completion) -> dict[str, int]:
    total = done.prompt_tokens + done.tokens
    return {"prompt_tokens": done.prompt_tokens, "completion_tokens": done.tokens, "total_tokens": total}
