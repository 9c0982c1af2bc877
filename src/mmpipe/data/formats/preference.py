"""Preferences: two answers to one question, ``{"id", "image", "chosen", "rejected"}``, in one of three forms.

* LLaVA-MoD's: ``chosen`` and ``rejected`` are whole conversations of LLaVA's turns, the same up to the last answer.
* LLaMA-Factory's: ``conversations`` is the prompt, ``chosen`` and ``rejected`` are one turn each.
* TRL's: ``prompt``, ``chosen`` and ``rejected`` are lists of chat messages, or texts. The prompt may be left out where
  the other two begin with it.
"""

from __future__ import annotations

from typing import Any

from mmpipe.data.formats.base import (
    AnnotationRow,
    ParsedRecord,
    images_before_text,
    is_chat,
    read_images,
    read_turns,
    row_format,
)
from mmpipe.data.records import BadRecord, PreferenceRecord


@row_format
def read(record_id: str, row: AnnotationRow, source: str) -> ParsedRecord:
    images = read_images(row)
    prompt = _messages(row.get("prompt"), "user") or _messages(row.get("conversations"), "user")
    both = [[*prompt, *_messages(row.get(key), "assistant")] for key in ("chosen", "rejected")]
    (chosen, notes), (rejected, _) = (read_turns(messages, row.get("system")) for messages in both)
    if chosen[:-1] != rejected[:-1]:
        raise BadRecord("different questions", "chosen and rejected do not answer the same question")
    if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise BadRecord("odd turn order", "chosen and rejected must end with an answer")
    question = chosen[:-1]
    if is_chat(both[0][0]):
        question, moved = images_before_text(question, images)
        notes = (*notes, *moved)
    record = PreferenceRecord(record_id, source, images.names, question, chosen[-1].text, rejected[-1].text)
    return ParsedRecord(record_id, record, notes=notes, embedded=images.embedded)


def _messages(value: Any, role: str) -> list[Any]:
    """A list of messages from one message, from a text by ``role``, or from None."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else []
