"""RLAIF-V's format: rows of ``question``, ``chosen``, ``rejected`` and the image in ``image``.

The columns are those of the Hugging Face data set ``openbmb/RLAIF-V-Dataset``, which is Parquet.
"""

from __future__ import annotations

from mmpipe.data.formats.base import AnnotationRow, ParsedRecord, read_images, row_format
from mmpipe.data.records import IMAGE_MARK, BadRecord, PreferenceRecord, Turn


@row_format
def read(record_id: str, row: AnnotationRow, source: str) -> ParsedRecord:
    question, chosen, rejected = (_text(row, name) for name in ("question", "chosen", "rejected"))
    if not question.strip():
        raise BadRecord("empty question", "'question' has no text")
    images = read_images(row)
    prompt = Turn("user", f"{IMAGE_MARK}\n{question}")
    record = PreferenceRecord(record_id, source, images.names, (prompt,), chosen, rejected)
    return ParsedRecord(record_id, record, embedded=images.embedded)


def _text(row: AnnotationRow, name: str) -> str:
    if not isinstance(row.get(name), str):
        raise BadRecord("malformed turn", f"there is no text under '{name}'")
    return row[name]
