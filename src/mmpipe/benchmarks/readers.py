"""Two forms that many benchmarks come in besides their official one: parquet tables of the hub, and the question
files of LLaVA's evaluation archive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mmpipe.benchmarks.base import Question, Record, Source, records_of
from mmpipe.benchmarks.image_bytes import hub_image
from mmpipe.benchmarks.jsonl import parquet_rows, read_document


def on_hub(source: Source) -> bool:
    """Whether the files are the hub's table (role ``parquet``): it is there and the first official file is not."""
    return source.has("parquet") and not source.has(next(iter(source.files)))


def hub_records(source: Source, columns: Sequence[str], optional: Sequence[str] = ()) -> list[Record]:
    """The rows of the hub's table without images, which are not even read.

    Raises DataError when the table lacks one of ``columns``.
    """
    return list(parquet_rows(source.path("parquet"), columns, optional))


def hub_images(source: Source, role: str = "parquet", column: str = "image") -> Iterator[bytes]:
    """The images of the hub's table, one a row. Raises DataError for a row without one."""
    for place, row in enumerate(parquet_rows(source.path(role), [column])):
        yield hub_image(row[column], f"{source.path(role)}, row {place}")


def images_of(source: Source, names: Iterable[str], column: str = "image") -> Iterator[bytes | Path]:
    """The images of the records in their order: those of the hub's table, or the files ``names`` below ``images``."""
    if on_hub(source):
        yield from hub_images(source, column=column)
    else:
        yield from map(source.image, names)


def hub_images_if_any(source: Source, column: str = "image") -> Iterator[bytes | None]:
    """The same for tables of which some rows, or some files, have no image."""
    for place, row in enumerate(parquet_rows(source.path("parquet"), (), [column])):
        value = row.get(column)
        yield None if value is None else hub_image(value, f"{source.path('parquet')}, row {place}")


def as_llava_asks(source: Source, role: str = "prompts") -> Iterator[Question]:
    """The questions of LLaVA's own file (``question_id, image, text, category`` a line), word for word.

    Images lie below the role ``images``. Raises DataError for a line without these fields.
    """
    for record in _llava_lines(source.path(role)):
        yield Question(
            id=record["question_id"],
            text=str(record["text"]),
            images=(source.image(str(record["image"])),),
            extra={"category": record["category"]} if "category" in record else {},
        )


def _llava_lines(path: Path) -> list[Record]:
    return records_of([read_document(path)], ("question_id", "image", "text"))
