"""Chat messages: ``{"messages": [{"role", "content"}, ...], "images": [...]}``.

``content`` is a text with image marks, or a list of ``{"type": "text", "text"}`` and ``{"type": "image"}``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmpipe.data.formats.base import Draft, Row, drafts, read_pictures, read_turns
from mmpipe.data.records import IMAGE_MARK, BadRecord, Record


def read(path: Path, source: str) -> Iterator[Draft]:
    """The records of one file, in its order."""

    def make(record_id: str, row: Row) -> Draft:
        pictures = read_pictures(row, "images")
        messages = row.get("messages")
        if isinstance(messages, list):
            messages = [_flat(message, number) for number, message in enumerate(messages, start=1)]
        turns, notes = read_turns(messages, "role", "content")
        record = Record(record_id, source, pictures.names, turns)
        return Draft(record_id, record, notes=notes, embedded=pictures.embedded)

    return drafts(path, make)


def _flat(message: Any, number: int) -> Any:
    """The message with its content as one text."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    return message | {"content": "".join(_part(part, number) for part in message["content"])}


def _part(part: Any, number: int) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return IMAGE_MARK
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise BadRecord("malformed turn", f"turn {number} has a part of type {kind!r}; expected text or image")
