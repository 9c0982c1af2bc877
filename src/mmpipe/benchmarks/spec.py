"""Entries of the catalogue ``config/benchmarks.yaml``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmpipe.settings import Settings


class JudgeSettings(Settings):
    """A judge model and its budget."""

    base_url: str = Field(pattern="^https?://")
    """The endpoint up to ``/v1``; requests go to ``/chat/completions`` below it."""
    model: str
    """Name of the model; part of the score's identity."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; unset means that none is sent."""
    temperature: float = 0.0
    max_requests: int = Field(default=5000, ge=0)
    """Requests of one call, repeated ones included; the budget."""
    max_usd: float | None = Field(default=None, ge=0)
    """The most that one call may cost by the prices below; no request is sent that might exceed it."""
    usd_per_million_input: float = Field(default=0.0, ge=0)
    """Price of a million request tokens."""
    usd_per_million_output: float = Field(default=0.0, ge=0)
    """Price of a million reply tokens."""
    attempts: int = Field(default=5, ge=1)
    """Tries for one answer before it is recorded as failed."""
    backoff: float = Field(default=1.0, ge=0)
    """Seconds before the second try; doubles with each."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds to wait for a reply."""
    workers: int = Field(default=4, ge=1)
    """Concurrent requests."""


class BenchmarkEntry(Settings):
    """One entry of the catalogue: benchmark, files and protocol."""

    task: str
    """Name of the module in ``mmpipe.benchmarks``, e.g. ``mmbench``; or ``package.module:BENCHMARK`` for one of your
    own, from the project directory or any installed package."""

    data: str
    """Name of the data set in ``config/datasets.yaml`` that holds the benchmark's files."""

    files: dict[str, str] = Field(default_factory=dict)
    """File names inside the data set by role (``questions``, ``annotations``, ``images``, ...), where they
    differ from the official names that the benchmark module knows."""

    protocol: str = ""
    """Name of the protocol: prompt, generation settings and scoring rule. Empty means the official one."""

    chunks: int = Field(default=1, ge=1)
    """Number of chunks of the questions; the answers do not depend on it."""

    batch_size: int = Field(default=16, ge=1)
    """Batch size; the answers do not depend on it."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest answer in tokens; without it the protocol's own."""

    questions: int | None = Field(default=None, ge=1)
    """Number of questions in the real files; another number is an error. A configuration with other ``data`` or
    ``files`` and no number drops it."""

    limit: int | None = Field(default=None, ge=1)
    """Answer only this many question groups (a circular question counts once); for trials, never for reports."""

    control: Literal["shuffle_images", "without_first_expert"] | None = None
    """``shuffle_images`` asks every question with the image of another one: what a model scores without
    seeing. ``without_first_expert`` leaves out the first expert each token chooses."""

    title: str = ""
    """Title of the benchmark in tables and report; by default the name of the entry."""

    scored: bool = True
    """False where only a server can score the answers: there is a submission and no score."""

    judge: JudgeSettings | None = None
    """The judge model, for protocols that need one; its key comes from the environment."""
