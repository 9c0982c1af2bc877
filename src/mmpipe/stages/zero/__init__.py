"""DeepSpeed ZeRO kinds (``hardware: {deepspeed: zero2}``): one JSON file each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import read_json


def kinds() -> list[str]:
    """The names a recipe can give."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.json"))


def configuration(kind: str) -> dict[str, Any]:
    """The kind's part of DeepSpeed's configuration; the rest follows from the stage's settings."""
    content: dict[str, Any] = read_json(Path(__file__).with_name(f"{kind}.json"))
    return content


def optimization(kind: str) -> dict[str, Any]:
    """What a kind partitions: ``stage``, and ``offload_optimizer`` and ``offload_param`` where they stay in CPU RAM."""
    chosen: dict[str, Any] = configuration(kind)["zero_optimization"]
    return chosen
