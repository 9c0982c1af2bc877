"""Small self-contained HTML pages. All text is escaped: answers of models are untrusted."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mmpipe.artifacts.files import write_text


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("mmpipe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(path: Path, template: str, **content: Any) -> None:
    """Fill ``templates/{template}`` and write it."""
    write_text(path, _environment().get_template(template).render(**content))
