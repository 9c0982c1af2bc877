"""What is said in a conversation, and how the next answer is to be found. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmpipe.data.records import Role
from mmpipe.errors import MmpipeError

if TYPE_CHECKING:
    from PIL import Image


class ChatError(MmpipeError):
    """A conversation cannot go on as asked."""


@dataclass(frozen=True)
class Message:
    """What one side says: texts and images (RGB), in order."""

    role: Role
    parts: tuple[str | Image.Image, ...]

    @property
    def text(self) -> str:
        """The words alone."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The images alone."""
        return tuple(part for part in self.parts if not isinstance(part, str))

    def to_chat(self) -> dict[str, Any]:
        """In the form that processors of transformers take."""
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in self.parts
        ]
        return {"role": self.role, "content": content}


def ask(text: str, images: Sequence[Image.Image] = ()) -> Message:
    """A question of the user, its images first."""
    return Message("user", (*images, *([text] if text else [])))


def said(text: str) -> Message:
    """An answer."""
    return Message("assistant", (text,))


@dataclass(frozen=True)
class Sampling:
    """How the words of an answer are chosen. Raises ChatError for impossible values."""

    temperature: float = 0.2
    """0 always takes the likeliest word."""
    top_p: float = 1.0
    """Only the likeliest words that together have this probability are drawn from."""
    max_tokens: int = 512
    seed: int | None = None
    """Without one, every answer is drawn anew."""
    stop: tuple[str, ...] = ()
    """The answer ends before any of these texts."""

    def __post_init__(self) -> None:
        for name, value, good in (
            ("temperature", self.temperature, 0 <= self.temperature <= 10),
            ("top_p", self.top_p, 0 < self.top_p <= 1),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1),
        ):
            if not good:
                raise ChatError(f"{name} cannot be {value}: {_RANGES[name]}")


_RANGES = {
    "temperature": "0 (always the likeliest word) to 10",
    "top_p": "more than 0, at most 1",
    "max_tokens": "at least 1",
}


@dataclass(frozen=True)
class Reply:
    """A finished answer."""

    text: str
    prompt_tokens: int
    """Images included."""
    tokens: int
    finish: str
    """``stop``: the model ended it; ``length``: it was cut at the limit; ``stopped``: somebody stopped it."""
    expert_loads: dict[str, list[float]] = field(default_factory=dict)
    """By layer, the share of the choices that each expert carried out, prompt and answer together."""
    keep_maps: list[list[bool]] = field(default_factory=list)
    """Of every image of the conversation, which of its tokens a sparsified model kept, row by row."""
