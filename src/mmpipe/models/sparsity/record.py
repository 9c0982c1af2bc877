"""Decisions of a sparsified model while it answered, as plain data: for efficiency figures and token retention maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Map = list[list[bool]]


@dataclass(frozen=True)
class KeepDecision:
    """Which tokens one forward pass retained."""

    prompt: bool
    """Whether it read a prompt (or a piece of one) rather than a generated token."""
    keep: Map
    """Of every row, which of its tokens (padding left out) were retained."""
    images: Map
    """Of every image, which of its tokens were retained, in the order of rows and places."""
    computed: list[int]
    """Tokens of each row that went through the deep layers."""
    cached: list[int]
    """Tokens of each row that a deep layer's cache holds behind the pass; empty without a cache."""
    cached_whole: list[int]
    """The same of the layers before the sparse one."""


@dataclass
class KeepRecord:
    """The forward passes since recording began."""

    passes: list[KeepDecision] = field(default_factory=list)


@contextmanager
def recording(model: Any) -> Iterator[KeepRecord]:
    """Record the decisions of a sparsified ``model``; a pass that drops nothing by settings is not recorded."""
    sparsifier = model.model.language_model.sparsifier
    record, before = KeepRecord(), sparsifier.record
    sparsifier.record = record
    try:
        yield record
    finally:
        sparsifier.record = before
