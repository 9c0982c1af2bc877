"""LLaVA-MoD's preference format: ``{"id", "image", "chosen": [turns], "rejected": [turns]}``.

Turns are written as LLaVA's; both conversations are the same up to the last answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmpipe.data.formats.base import Draft, Row, drafts, read_pictures, read_turns
from mmpipe.data.records import BadRecord, PreferenceRecord


def read(path: Path, source: str) -> Iterator[Draft]:
    """The records of one file, in its order."""

    def make(record_id: str, row: Row) -> Draft:
        pictures = read_pictures(row, "image")
        chosen, notes = read_turns(row.get("chosen"), "from", "value")
        rejected, _ = read_turns(row.get("rejected"), "from", "value")
        if chosen[:-1] != rejected[:-1]:
            raise BadRecord("different questions", "chosen and rejected do not answer the same question")
        if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
            raise BadRecord("odd turn order", "chosen and rejected must end with an answer")
        record = PreferenceRecord(
            record_id, source, pictures.names, chosen[:-1], chosen[-1].text, rejected[-1].text
        )
        return Draft(record_id, record, notes=notes, embedded=pictures.embedded)

    return drafts(path, make)
