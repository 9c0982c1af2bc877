"""LLaVA's format, which is ShareGPT's: ``{"id", "image", "conversations": [{"from", "value"}, ...]}``.

One array, or one record a line. Several images stand in a list, under ``image`` or ``images``; a ``system`` message may
stand beside the conversation.
"""

from __future__ import annotations

from mmpipe.data.formats.base import AnnotationRow, ParsedRecord, read_images, read_turns, row_format
from mmpipe.data.records import BadRecord, Record


@row_format
def read(record_id: str, row: AnnotationRow, source: str) -> ParsedRecord:
    if row.get("video") or row.get("videos"):
        raise BadRecord("video", "the record is about a video; only images are supported")
    images = read_images(row)
    turns, notes = read_turns(row.get("conversations"), row.get("system"))
    record = Record(record_id, source, images.names, turns)
    return ParsedRecord(record_id, record, notes=notes, embedded=images.embedded)
