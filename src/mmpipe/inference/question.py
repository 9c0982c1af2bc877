"""The questions a model is asked, and the interface of a log of its experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Key = tuple[str, str]
"""Id and prompt of a question: some benchmarks ask two things under one id."""


@dataclass(frozen=True)
class Question:
    """One question as the model is asked it."""

    id: int | str
    text: str
    """The user's turn without chat template. Where ``<image>`` does not stand in it, the images come first."""
    images: tuple[bytes | Path, ...] = ()
    """Encoded image files, or paths of them."""
    prompt: str | None = None
    """What the answer record stores as ``prompt`` where that is not ``text``."""
    group: str = ""
    """Questions that belong together (the rotations of one circular question); empty: it stands alone."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The benchmark's own fields of the answer record."""

    @property
    def recorded_prompt(self) -> str:
        """What the answer record stores as ``prompt``."""
        return self.text if self.prompt is None else self.prompt

    @property
    def key(self) -> Key:
        """Identifies the question among all of its benchmark."""
        return str(self.id), self.recorded_prompt


Owner = tuple[Question, int]
"""What a row of a batch is computed for: a question, and how many questions share it."""


class ChoiceLog(Protocol):
    """Notes which experts a model chooses while it answers (see :class:`mmpipe.analysis.expert_log.ExpertLog`)."""

    def prompts(self, owners: Sequence[Owner], ids: Tensor, real: Tensor, positions: Tensor) -> None:
        """Note the forward pass just made of prompts ``ids`` ``[B, L]``."""

    def generated(self, owners: Sequence[Owner], alive: Sequence[bool], positions: Tensor) -> None:
        """Note the forward pass just made of one generated token a row."""

    def generate(self, owners: Sequence[Owner], ids: Tensor, mask: Tensor, lengths: Sequence[int]) -> None:
        """Note all forward passes of a call of the model's own ``generate``."""

    def write(self, questions: Iterable[Question]) -> None:
        """Store what was noted of these questions."""
