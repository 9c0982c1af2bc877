"""Export of mixtures: LLaVA's JSON, chat messages in Parquet, LLaVA-MoD's preference pairs.

Records are streamed: memory does not grow with their number. The file is written atomically,
after the images that it names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import atomic_open, copy_file
from mmpipe.data.mixture import RECORDS
from mmpipe.data.record_table import RecordTable
from mmpipe.data.records import AnyRecord, PreferenceRecord, Record, Turn
from mmpipe.data.templates import to_messages
from mmpipe.errors import ArtifactError, ConfigError, DataError, did_you_mean

_SPEAKERS = {"user": "human", "assistant": "gpt"}
_ROWS = 512
_GROUP_BYTES = 32 << 20
"""Bytes of embedded images in a Parquet row group."""

R = TypeVar("R", Record, PreferenceRecord)


ImageNames = Callable[[str], str]
"""The name in the exported file of an image that records name; images are placed where that name leads."""


def keep_in_place(root: Path) -> ImageNames:
    """Images stay where they are, named relative to ``root``; DataError for one that is not below it."""

    def name(stored: str) -> str:
        path, folder = (Path(os.path.abspath(each)) for each in (stored, root))
        if not path.is_relative_to(folder):
            raise DataError(
                f"{stored}: lies outside of {folder}; name a folder above it, or let images be put into one"
            )
        return path.relative_to(folder).as_posix()

    return name


def place_in_folder(folder: Path, copy: bool = False) -> ImageNames:
    """Images are linked or copied into ``folder`` and named relative to it."""

    def name(stored: str) -> str:
        relative = stored.lstrip("/")
        target = folder / relative
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # a dangling link
            if copy:
                copy_file(Path(stored), target)
            else:
                target.symlink_to(Path(stored).resolve())
        return relative

    return name


def export_mixture(mixture: Path, out: Path, layout: str, names: ImageNames, *, embed: bool = False) -> int:
    """Write the records of a published mixture into the file ``out``; returns how many.

    ``layout`` is a name of :data:`LAYOUTS`; ``embed`` puts the images themselves into the file, where the layout can
    hold them. Raises ArtifactError for a mixture that is not there, ConfigError for an unknown or unfit layout,
    DataError for an image that is missing.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"there is no layout '{layout}'{did_you_mean(layout, LAYOUTS)}")
    if embed and layout != "messages":
        raise ConfigError(f"the layout '{layout}' names images; only 'messages' can hold them")
    if out.exists():
        raise ConfigError(f"{out}: exists; name a file that does not")
    if not (mixture / manifest.NAME).is_file():
        raise ArtifactError(f"{mixture}: no published mixture; make it: snakemake {mixture / manifest.NAME}")
    records = RecordTable(mixture / RECORDS)
    with atomic_open(out) as file:
        LAYOUTS[layout](records, file, names, embed)
    return len(records)


def _llava(records: RecordTable, file: BinaryIO, names: ImageNames, embed: bool) -> None:
    talks = (_of_kind(record, Record, "messages' or 'preference") for record in records)
    _write_array(file, ({**_head(talk, talk.turns, names), "conversations": _said(talk.turns)} for talk in talks))


def _preference(records: RecordTable, file: BinaryIO, names: ImageNames, embed: bool) -> None:
    pairs = (_of_kind(record, PreferenceRecord, "llava' or 'messages") for record in records)
    keys = ("chosen", "rejected")
    answers = ((pair, zip(keys, pair.conversations, strict=True)) for pair in pairs)
    _write_array(
        file,
        (
            {**_head(pair, pair.prompt, names), **{key: _said(talk.turns) for key, talk in both}}
            for pair, both in answers
        ),
    )


def _messages(records: RecordTable, file: BinaryIO, names: ImageNames, embed: bool) -> None:
    pairs = len(records) > 0 and isinstance(records[0], PreferenceRecord)
    columns = ("prompt", "chosen", "rejected") if pairs else ("messages",)

    def row(record: AnyRecord) -> dict[str, Any]:
        if isinstance(record, PreferenceRecord) != pairs:
            raise DataError(f"{record.source}/{record.id}: conversations and preferences cannot stand in one table")
        conversations: Sequence[Sequence[Turn]] = (
            (record.prompt, (Turn("assistant", record.chosen),), (Turn("assistant", record.rejected),))
            if isinstance(record, PreferenceRecord)
            else (record.turns,)
        )
        said = {name: to_messages(turns) for name, turns in zip(columns, conversations, strict=True)}
        return {
            "id": record.id,
            "source": record.source,
            **said,
            "images": [_image(stored, names, embed) for stored in record.images],
        }

    schema = _message_schema(columns)
    with pq.ParquetWriter(file, schema) as writer:
        for group in _groups(map(row, records)):
            writer.write_batch(pa.RecordBatch.from_pylist(group, schema=schema))


LAYOUTS: dict[str, Callable[[RecordTable, BinaryIO, ImageNames, bool], None]] = {
    "llava": _llava,
    "messages": _messages,
    "preference": _preference,
}
"""``llava``: an array of ``{"id", "image", "conversations"}``. ``messages``: Parquet of chat messages and images as TRL
and ``datasets`` read it, of preferences with ``prompt``, ``chosen`` and ``rejected``. ``preference``: LLaVA-MoD's array
of ``{"id", "image", "chosen", "rejected"}``."""


def _of_kind(record: AnyRecord, kind: type[R], others: str) -> R:
    if not isinstance(record, kind):
        raise ConfigError(f"{record.source}/{record.id} is no record of this layout; take '{others}'")
    return record


def _head(record: AnyRecord, turns: Sequence[Turn], names: ImageNames) -> dict[str, Any]:
    """The fields before the conversation. A system message is a field of its own, as in ShareGPT; LLaVA ignores it."""
    images = [names(stored) for stored in record.images]
    system = turns[0].text if turns[0].role == "system" else None
    return {
        "id": record.id,
        "source": record.source,
        **({"image": images[0] if len(images) == 1 else images} if images else {}),
        **({"system": system} if system else {}),
    }


def _said(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"from": _SPEAKERS[turn.role], "value": turn.text} for turn in turns if turn.role != "system"]


def _write_array(file: BinaryIO, rows: Iterator[dict[str, Any]]) -> None:
    """A JSON array, one element a line."""
    before = "[\n"
    for row in rows:
        file.write((before + json.dumps(row, ensure_ascii=False)).encode())
        before = ",\n"
    file.write(b"\n]\n")


def _image(stored: str, names: ImageNames, embed: bool) -> dict[str, Any]:
    if not embed:
        return {"bytes": None, "path": names(stored)}
    try:
        return {"bytes": Path(stored).read_bytes(), "path": Path(stored).name}
    except OSError as error:
        raise DataError(f"{stored}: the image cannot be read ({error.strerror}); build the mixture again") from error


def _message_schema(columns: Sequence[str]) -> Any:
    """The columns, with the metadata by which ``datasets`` recognises ``images``."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    messages = List({"role": text, "content": List({"type": text, "text": text})})
    return Features(
        {"id": text, "source": text, **dict.fromkeys(columns, messages), "images": List(Image())}
    ).arrow_schema


def _groups(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows per write, fewer with large images."""
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += sum(len(image["bytes"] or b"") for image in row["images"])
        if len(group) == _ROWS or size > _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
