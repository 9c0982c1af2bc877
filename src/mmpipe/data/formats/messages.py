"""Chat messages, as TRL and others read them: ``{"messages": [{"role", "content"}, ...], "images": [...]}``.

``content`` is a text with image marks, or a list of ``{"type": "text", "text"}`` and ``{"type": "image"}``. Where
neither says where images go, they go before the first question.
"""

from __future__ import annotations

from mmpipe.data.formats.base import (
    AnnotationRow,
    ParsedRecord,
    images_before_text,
    read_images,
    read_turns,
    row_format,
)
from mmpipe.data.records import Record


@row_format
def read(record_id: str, row: AnnotationRow, source: str) -> ParsedRecord:
    images = read_images(row)
    turns, notes = read_turns(row.get("messages"), row.get("system"))
    turns, moved = images_before_text(turns, images)
    record = Record(record_id, source, images.names, turns)
    return ParsedRecord(record_id, record, notes=(*notes, *moved), embedded=images.embedded)
