"""LLaVA's format: ``{"id", "image", "conversations": [{"from", "value"}, ...]}``, one array or one a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmpipe.data.formats.base import Draft, Row, drafts, read_pictures, read_turns
from mmpipe.data.records import BadRecord, Record


def read(path: Path, source: str) -> Iterator[Draft]:
    """The records of one file, in its order."""

    def make(record_id: str, row: Row) -> Draft:
        if row.get("video"):
            raise BadRecord("video", "the record is about a video; only pictures are supported")
        pictures = read_pictures(row, "image")
        turns, notes = read_turns(row.get("conversations"), "from", "value")
        record = Record(record_id, source, pictures.names, turns)
        return Draft(record_id, record, notes=notes, embedded=pictures.embedded)

    return drafts(path, make)
