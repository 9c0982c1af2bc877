"""What all formats share: the rows of a file, and the pieces records are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from mmpipe.data.json_stream import read_values
from mmpipe.data.records import AnyRecord, BadRecord, Role, Turn
from mmpipe.errors import DataError

Row = Mapping[str, Any]

ROLE_NAMES: Mapping[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    **{role: role for role in get_args(Role)},
}
"""Who speaks, by the names that data sets use."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A record as it was found, or why none could be made of it."""

    id: str
    record: AnyRecord | None = None
    fault: BadRecord | None = None
    notes: tuple[str, ...] = ()
    """What was put right in reading."""
    embedded: tuple[bytes, ...] = ()
    """The pictures themselves, where the annotations contain them; else ``record.images`` names files."""


class Format(Protocol):
    """A module of this package."""

    def read(self, path: Path, source: str) -> Iterator[Draft]:
        """The records of one file, in its order. Raises DataError when the file itself is damaged."""
        ...


def drafts(path: Path, make: Callable[[str, Row], Draft]) -> Iterator[Draft]:
    """What ``make(id, row)`` makes of each row of a JSON, JSON-lines or Parquet file.

    ``make`` may raise BadRecord. A row without an id is called after the file and its number in it.
    """
    for number, (place, row) in enumerate(_rows(path)):
        record_id = f"{path.stem}-{number}"
        try:
            if not isinstance(row, dict):
                raise BadRecord("not a record", "expected an object with named values")
            if row.get("id") not in (None, ""):
                record_id = str(row["id"])
            yield make(record_id, row)
        except BadRecord as fault:
            yield Draft(record_id, fault=BadRecord(fault.reason, f"{fault.detail} ({path}, {place})"))


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file, each with its place; the content decides how it is read, not the name."""
    if _is_parquet(path):
        yield from ((f"row {number}", row) for number, row in enumerate(_parquet_rows(path), start=1))
    else:
        yield from ((f"line {line}", value) for line, value in read_values(path))


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PAR1"
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); fetch it again") from error


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures of a row: names of files, or placeholders and the content itself."""

    names: tuple[str, ...]
    embedded: tuple[bytes, ...] = ()


def read_pictures(row: Row, key: str) -> Pictures:
    """What stands under ``key``: nothing, one picture or a list of them.

    A picture is a file name or, as ``datasets`` writes it, ``{"bytes", "path"}``.
    """
    value = row.get(key)
    if value in (None, ""):
        return Pictures(())
    values = value if isinstance(value, list) else [value]
    contents = [one.get("bytes") if isinstance(one, dict) else None for one in values]
    embedded = tuple(content for content in contents if isinstance(content, bytes))
    if embedded and len(embedded) == len(values):
        return Pictures(("embedded",) * len(embedded), embedded)
    names = [one.get("path") if isinstance(one, dict) else one for one in values]
    files = tuple(name for name in names if isinstance(name, str) and name)
    if embedded or len(files) < len(values):
        raise BadRecord("malformed pictures", f"'{key}' is neither a file name nor a list of file names")
    return Pictures(files)


def read_turns(conversation: Any, role: str, text: str) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """Turns from a list of ``{role: ..., text: ...}``, and notes.

    An answer before the first question is left out, as LLaVA does.
    """
    if not isinstance(conversation, list) or not conversation:
        raise BadRecord("no conversation", "the conversation is missing or empty")
    turns: list[Turn] = []
    for position, message in enumerate(conversation):
        if not isinstance(message, dict) or not isinstance(message.get(text), str):
            raise BadRecord("malformed turn", f"turn {position + 1} has no text under '{text}'")
        speaker = message.get(role)
        if not isinstance(speaker, str) or speaker not in ROLE_NAMES:
            raise BadRecord("unknown role", f"turn {position + 1} is spoken by {speaker!r}")
        turns.append(Turn(ROLE_NAMES[speaker], message[text]))
    if len(turns) > 1 and turns[0].role == "assistant":
        return tuple(turns[1:]), ("answer before the first question left out",)
    return tuple(turns), ()
