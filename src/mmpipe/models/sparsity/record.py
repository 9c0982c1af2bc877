"""Decisions of a sparsified model during generation, as plain data, for efficiency figures and token retention maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

TokenGrid = list[list[bool]]


@dataclass(frozen=True)
class KeepDecision:
    """The retained tokens of one forward pass."""

    prompt: bool
    """Whether the input was a prompt (or a piece of one) rather than a generated token."""
    keep: TokenGrid
    """Mask of each row's retained tokens, padding left out."""
    images: TokenGrid
    """Mask of each image's retained tokens, in the order of rows and positions."""
    computed: list[int]
    """Tokens of each row that the deep layers computed."""
    cached: list[int]
    """Tokens of each row in a deep layer's cache after the pass; empty without a cache."""
    cached_whole: list[int]
    """The same of the layers before the sparse one."""


@dataclass
class KeepRecord:
    """The forward passes since recording began."""

    passes: list[KeepDecision] = field(default_factory=list)


@contextmanager
def recording(model: Any) -> Iterator[KeepRecord]:
    """Record the decisions of a sparsified ``model``; a pass whose settings drop nothing is not recorded."""
    sparsifier = model.model.language_model.sparsifier
    record, before = KeepRecord(), sparsifier.record
    sparsifier.record = record
    try:
        yield record
    finally:
        sparsifier.record = before
