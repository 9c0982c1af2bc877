"""Comparisons and verification reports as tables."""

from __future__ import annotations

from pathlib import Path

from mmpipe.artifacts.files import read_json
from mmpipe.report.page import write_page


def comparison_page(comparison: Path, page: Path) -> None:
    """Lay out ``results/{benchmark}.json``."""
    content = read_json(comparison)
    write_page(page, "comparison.html", title=content["benchmark"], comparison=content)


def mixture_page(report: Path, page: Path) -> None:
    """Lay out a mixture's ``report.json``."""
    content = read_json(report)
    sources = [
        {
            "name": name,
            **{key: source[key] for key in ("found", "wanted", "kept")},
            "dropped": sum(source["dropped"].values()),
            "reasons": ", ".join(f"{reason}: {count}" for reason, count in source["dropped"].items()),
        }
        for name, source in content["sources"].items()
    ]
    write_page(
        page,
        "mixture.html",
        title=f"Data of {report.parent.name}",
        sources=sources,
        notes=list(content.get("notes", {}).items()),
    )
