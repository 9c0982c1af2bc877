"""What a teacher's written-down tokens take on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmpipe.artifacts.files import read_json
from mmpipe.stages.base import Annotation

if TYPE_CHECKING:
    from mmpipe.plan.plan import Plan

ENTRY_BYTES = 6
"""Of one token: its id in 4 bytes, its log-probability in 2."""


def bytes_per_token(annotation: Annotation) -> int | None:
    """Bytes for every supervised token of the mixture; None for preference pairs, which take two numbers a pair."""
    settings = annotation.settings
    return ENTRY_BYTES * int(settings["k"]) if "k" in settings else None


def total_bytes(plan: Plan, annotation: Annotation, root: Path = Path()) -> int | None:
    """Bytes of all entries; None until the mixture is tokenised, and for preference pairs."""
    each = bytes_per_token(annotation)
    report = root / plan.annotated_tokens(annotation).directory / "report.json"
    return each * int(read_json(report)["supervised_tokens"]) if each and report.is_file() else None
