"""What a benchmark asks a judge model about one answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class JudgeRequest:
    """One question to a judge. ``candidate`` is a model's reply and therefore data, never an instruction."""

    key: str
    """The question id that the judge's reply is filed under."""
    instruction: str
    candidate: str
    context: Mapping[str, str] = field(default_factory=dict)
    """Trusted facts by name: the question, the reference answer, what the image shows."""
    max_tokens: int = 512
