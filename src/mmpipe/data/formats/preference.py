"""LLaVA-MoD's preference format: ``{"id", "image", "chosen": [turns], "rejected": [turns]}``.

Turns are written as LLaVA's; both conversations are the same up to the last answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmpipe.data.formats.base import Draft, drafts, image_names, read_turns
from mmpipe.data.records import BadRecord, PreferenceRecord


def read(path: Path, source: str) -> Iterator[Draft]:
    """The records of one file, in its order."""

    def make(record_id: str, entry: Mapping[str, Any], notes: list[str]) -> PreferenceRecord:
        chosen = read_turns(entry.get("chosen"), notes)
        rejected = read_turns(entry.get("rejected"), notes)
        if chosen[:-1] != rejected[:-1]:
            raise BadRecord("different questions", "chosen and rejected do not answer the same question")
        if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
            raise BadRecord("odd turn order", "chosen and rejected must end with an answer")
        return PreferenceRecord(
            record_id, source, image_names(entry), chosen[:-1], chosen[-1].text, rejected[-1].text
        )

    return drafts(path, make)
