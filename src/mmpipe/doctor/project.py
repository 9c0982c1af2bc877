"""What ``pyproject.toml`` says about the project."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any


def project(root: Path) -> dict[str, Any]:
    """The table ``[project]``; empty where the project's sources are not beside the configuration."""
    file = root / "pyproject.toml"
    if not file.is_file():
        return {}
    table: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    return table
