"""What a model decided while it answered, as plain data: for figures of efficiency and maps of what was kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmpipe.models.sparsity.context import PruningPass, Setting

Map = list[list[bool]]


@dataclass(frozen=True)
class Decided:
    """One forward pass."""

    prompt: bool
    """Whether it read a prompt (or a piece of one) rather than a generated token."""
    keep: Map
    """Of every row, which of its tokens (padding left out) were kept."""
    images: Map
    """Of every image, which of its tokens were kept, in the order of rows and places."""
    computed: list[int]
    """Tokens of each row that went through the deep layers."""
    cached: list[int]
    """Tokens of each row that a deep layer's cache holds behind the pass; empty without a cache."""
    cached_whole: list[int]
    """The same of the layers before the sparse one."""


@dataclass
class Record:
    """The forward passes since recording began."""

    passes: list[Decided] = field(default_factory=list)

    def note(self, done: PruningPass, setting: Setting) -> None:
        """Add a pass that has decided."""
        assert done.keep_BL is not None
        real_BL, keep_BL = setting.real_BL, done.keep_BL
        images = keep_BL[done.images_BL].view(-1, setting.sparsifier.image_tokens).tolist()
        computed = keep_BL.sum(1).tolist() if done.is_prompt else real_BL.sum(1).tolist()
        cached = done.slots.counts if done.slots else []
        rows = [keep[real].tolist() for keep, real in zip(keep_BL, real_BL, strict=True)]
        self.passes.append(
            Decided(bool(done.is_prompt), rows, images, computed, cached, setting.whole_B.tolist() if cached else [])
        )


@contextmanager
def recording(model: Any) -> Iterator[Record]:
    """Record what a sparsified ``model`` decides; nothing is recorded of one that keeps everything."""
    sparsifier = model.model.language_model.sparsifier
    record, before = Record(), sparsifier.record
    sparsifier.record = record
    try:
        yield record
    finally:
        sparsifier.record = before
