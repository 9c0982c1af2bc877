"""Questions for a model, and the interface of a log of its experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Answer = dict[str, Any]
"""An answer record in LLaVA's schema, with a benchmark's own fields."""
Key = tuple[str, str]
"""Id and prompt of a question: some benchmarks have two prompts under one id."""


@dataclass(frozen=True)
class Question:
    """One question."""

    id: int | str
    text: str
    """The user's turn without chat template. Without ``<image>`` marks, the images come first."""
    images: tuple[bytes | Path, ...] = ()
    """Encoded image files, or paths of them."""
    prompt: str | None = None
    """``prompt`` of the answer record, where that is not ``text``."""
    group: str = ""
    """Key of questions that belong together (the rotations of a circular question); empty: none."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The benchmark's own fields of the answer record."""

    @property
    def recorded_prompt(self) -> str:
        """``prompt`` of the answer record."""
        return self.text if self.prompt is None else self.prompt

    @property
    def key(self) -> Key:
        """Identifies the question within its benchmark."""
        return str(self.id), self.recorded_prompt


Owner = tuple[Question, int]
"""Sharing of a batch row: a question, and how many questions share the row."""


class ChoiceLog(Protocol):
    """Records the experts chosen during generation (see :class:`mmpipe.analysis.expert_log.ExpertLog`)."""

    def prompts(self, owners: Sequence[Owner], ids: Tensor, real: Tensor, positions: Tensor) -> None:
        """Record the last forward pass, over prompts ``ids`` ``[B, L]``."""

    def generated(self, owners: Sequence[Owner], alive: Sequence[bool], positions: Tensor) -> None:
        """Record the last forward pass, over one generated token per row."""

    def generate(self, owners: Sequence[Owner], ids: Tensor, mask: Tensor, lengths: Sequence[int]) -> None:
        """Record all forward passes of a call of the model's own ``generate``."""

    def write(self, questions: Iterable[Question]) -> None:
        """Store the records of these questions."""
