"""Comparisons and reports on data as tables."""

from __future__ import annotations

from pathlib import Path

from mmpipe.artifacts.files import read_json
from mmpipe.report.page import write_page


def comparison_page(comparison: Path, page: Path) -> None:
    """Lay out ``results/{benchmark}.json``."""
    content = read_json(comparison)
    write_page(page, "comparison.html", title=content["title"], comparison=content)


def leaderboard_page(board: Path, page: Path) -> None:
    """Lay out ``results/leaderboard.json``."""
    write_page(page, "leaderboard.html", title="All benchmarks", board=read_json(board))


def mixture_page(report: Path, page: Path) -> None:
    """Lay out a mixture's ``report.json``."""
    write_page(page, "mixture.html", title=f"Data of {report.parent.name}", report=read_json(report))


def tokens_page(report: Path, page: Path) -> None:
    """Lay out the ``report.json`` of a mixture in tokens."""
    write_page(page, "tokens.html", title=f"Tokens of {report.parent.parent.name}", report=read_json(report))


def overlap_page(report: Path, page: Path) -> None:
    """Lay out which images of the benchmarks a mixture holds."""
    write_page(page, "overlap.html", title=f"Overlap of {report.stem}", report=read_json(report))
