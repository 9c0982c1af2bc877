"""LLaVA's format: ``{"id", "image", "conversations": [{"from", "value"}, ...]}``, one array or one a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmpipe.data.formats.base import Draft, drafts, image_names, read_turns
from mmpipe.data.records import BadRecord, Record


def read(path: Path, source: str) -> Iterator[Draft]:
    """The records of one file, in its order."""

    def make(record_id: str, entry: Mapping[str, Any], notes: list[str]) -> Record:
        if entry.get("video"):
            raise BadRecord("video", "the record is about a video; only pictures are supported")
        return Record(record_id, source, image_names(entry), read_turns(entry.get("conversations"), notes))

    return drafts(path, make)
