"""Messages of a conversation and finished answers. No torch here."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmpipe.data.records import Role
from mmpipe.errors import MmpipeError

if TYPE_CHECKING:
    from PIL import Image

    from mmpipe.chat.images import EncodedImage


class ChatError(MmpipeError):
    """A conversation cannot be continued with this request."""


@dataclass(frozen=True)
class Message:
    """A message: texts and images (RGB, or encoded), in order."""

    role: Role
    parts: tuple[str | Image.Image | EncodedImage, ...]

    @property
    def text(self) -> str:
        """Its texts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[Image.Image | EncodedImage, ...]:
        """Its images."""
        return tuple(part for part in self.parts if not isinstance(part, str))

    def to_chat(self) -> dict[str, Any]:
        """The message as ``apply_chat_template`` of a transformers processor takes it."""
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in self.parts
        ]
        return {"role": self.role, "content": content}


def images_first(parts: Iterable[Any]) -> tuple[Any, ...]:
    """The parts of a message, images moved to the head when all texts precede all images: the order of OpenAI's own
    example, which no prompt of a training has. Images between texts stay."""
    given = tuple(parts)
    texts = list(itertools.takewhile(lambda part: isinstance(part, str), given))
    images = given[len(texts) :]
    return (*images, *texts) if not any(isinstance(part, str) for part in images) else given


def user_message(text: str, images: Sequence[Image.Image | EncodedImage] = ()) -> Message:
    """A question, its images first."""
    return Message("user", (*images, *([text] if text else [])))


def assistant_message(text: str) -> Message:
    """An answer."""
    return Message("assistant", (text,))


@dataclass(frozen=True)
class Completion:
    """A finished answer."""

    text: str
    prompt_tokens: int
    """Image tokens included."""
    tokens: int
    finish: str
    """``stop``: ended by the model or a stop text; ``length``: cut at the limit; ``stopped``: cancelled."""
    expert_loads: dict[str, list[float]] = field(default_factory=dict)
    """Per MoE layer, each expert's share of the computed token assignments, prompt and answer together."""
    retention_maps: list[list[bool]] = field(default_factory=list)
    """Per image of the conversation, the mask of retained tokens of a sparsified model, row by row."""
