"""Chat messages, as TRL and others read them: ``{"messages": [{"role", "content"}, ...], "images": [...]}``.

``content`` is a text with image marks, or a list of ``{"type": "text", "text"}`` and ``{"type": "image"}``. Where neither
says where pictures go, they go before the first question.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmpipe.data.formats.base import Draft, Row, drafts, pictures_before_text, read_pictures, read_turns
from mmpipe.data.records import Record


def read(path: Path, source: str) -> Iterator[Draft]:
    """The records of one file, in its order."""

    def make(record_id: str, row: Row) -> Draft:
        pictures = read_pictures(row)
        turns, notes = read_turns(row.get("messages"), row.get("system"))
        turns, moved = pictures_before_text(turns, pictures)
        record = Record(record_id, source, pictures.names, turns)
        return Draft(record_id, record, notes=(*notes, *moved), embedded=pictures.embedded)

    return drafts(path, make)
