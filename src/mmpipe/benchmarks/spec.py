"""A benchmark as the catalogue ``config/benchmarks.yaml`` names it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmpipe.config.base import Settings


class BenchmarkEntry(Settings):
    """One entry of the catalogue: which benchmark, on which files, by which protocol."""

    task: str
    """Name of the module in ``mmpipe.benchmarks``, e.g. ``mmbench``."""

    data: str
    """Name of the data set in ``config/datasets.yaml`` that holds the benchmark's files."""

    files: dict[str, str] = Field(default_factory=dict)
    """File names inside the data set by role (``questions``, ``annotations``, ``images``, ...), where they
    differ from the official names that the benchmark module knows."""

    protocol: str = ""
    """Name of the protocol: prompt, generation settings and scoring rule. Empty means the official one."""

    chunks: int = Field(default=1, ge=1)
    """In how many parts the questions are answered; the answers do not depend on it."""

    batch_size: int = Field(default=16, ge=1)
    """Questions answered at a time; the answers do not depend on it."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest answer in tokens; without it the protocol's own."""

    limit: int | None = Field(default=None, ge=1)
    """Ask only the first so many question groups (a circular question counts once); for trials, never for
    reports."""

    control: Literal["shuffle_images"] | None = None
    """``shuffle_images`` asks every question with the picture of another one: what a model scores without
    seeing."""

    title: str = ""
    """How tables and the report call the benchmark; without it the name of the entry."""
