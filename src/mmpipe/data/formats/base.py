"""Common to all formats: rows of a file, images and turns of a row."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from mmpipe.data.json_stream import read_values
from mmpipe.data.records import IMAGE_MARK, AnyRecord, BadRecord, Role, Turn, check_unicode, is_unicode
from mmpipe.errors import DataError

AnnotationRow = Mapping[str, Any]

ROLE_NAMES: Mapping[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    **{role: role for role in get_args(Role)},
}
"""Roles by the names that data sets use."""


@dataclass(frozen=True, slots=True)
class ParsedRecord:
    """A parsed record, or the fault of its row."""

    id: str
    record: AnyRecord | None = None
    fault: BadRecord | None = None
    notes: tuple[str, ...] = ()
    """Corrections made while parsing."""
    embedded: tuple[bytes | None, ...] = ()
    """Image contents embedded in the annotations, in the order of ``record.images``; None, and all of them when it is
    empty: the name is that of a file."""


FormatReader = Callable[[Path, str], Iterator[ParsedRecord]]
"""Reads the records of a file, in its order, as those of a data set; DataError when the file itself is damaged."""


def row_format(parse: Callable[[str, AnnotationRow, str], ParsedRecord]) -> FormatReader:
    """A reader of JSON, JSON Lines and Parquet from ``parse(id, row, source)``, which may raise BadRecord. A row
    without an id is named by the file and its number in it."""
    return partial(_parsed_rows, parse)


def _parsed_rows(
    parse: Callable[[str, AnnotationRow, str], ParsedRecord], path: Path, source: str
) -> Iterator[ParsedRecord]:
    for number, (place, row) in enumerate(_rows(path)):
        record_id = f"{path.stem}-{number}"
        try:
            if not isinstance(row, dict):
                raise BadRecord("not a record", "expected an object with named values")
            if row.get("id") not in (None, ""):
                given = str(row["id"])
                if not is_unicode(given):
                    raise BadRecord("text that is not Unicode", f"half of a surrogate pair in the id {given!a}")
                record_id = given
            parsed = parse(record_id, row, source)
            if parsed.record:
                check_unicode(parsed.record)
            yield parsed
        except BadRecord as fault:
            yield ParsedRecord(record_id, fault=BadRecord(fault.reason, f"{fault.detail} ({path}, {place})"))


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file, each with its position; the format is detected from the content, not the name."""
    try:
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if is_parquet:
        yield from ((f"row {number}", row) for number, row in enumerate(_parquet_rows(path), start=1))
    else:
        yield from ((f"line {line}", value) for line, value in read_values(path))


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); fetch it again") from error


@dataclass(frozen=True, slots=True)
class Images:
    """The images of a row: names of files, or placeholders and the content itself."""

    names: tuple[str, ...]
    embedded: tuple[bytes | None, ...] = ()
    """As in :class:`ParsedRecord`."""


_NOTHING: tuple[Any, ...] = (None, "", [])
_MESSAGES = ("messages", "conversations", "prompt", "chosen")
_INSIDE = ("bytes", "image", "image_url", "path", "url")
"""Keys of an image that is an object, the first that holds something counts: of ``datasets``, OpenAI, Qwen."""
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
"""The first characters of JPEG, PNG, GIF and WebP files in base64."""
_SHORTEST_BASE64 = 64


def read_images(row: AnnotationRow) -> Images:
    """The images under ``image`` or ``images``, else under ``image_url``, else in the parts of the messages
    (``{"type": "image", "image": ...}``): none, one or a list. An image is a file name, the content of a file as
    bytes, in base64 or as a ``data:`` URL, or an object around one of these, e.g. ``{"bytes", "path"}``."""
    given = [key for key in ("image", "images") if row.get(key) not in _NOTHING]
    given = given or [key for key in ("image_url", "image_urls") if row.get(key) not in _NOTHING]
    if len(given) > 1:
        raise BadRecord("malformed images", f"there are images under '{given[0]}' and under '{given[1]}'")
    key = given[0] if given else "a part of a message"
    values = row[key] if given else _images_in_messages(row)
    found = [_image(value, key) for value in (values if isinstance(values, list) else [values])]
    names, contents = (tuple(name for name, _ in found), tuple(content for _, content in found))
    return Images(names, contents if any(content is not None for content in contents) else ())


def _images_in_messages(row: AnnotationRow) -> list[Any]:
    """The images in the parts of the first list of messages that holds any."""
    for key in _MESSAGES:
        messages = row.get(key) if isinstance(row.get(key), list) else []
        contents = [message.get("content") for message in messages or () if isinstance(message, dict)]
        parts = [part for content in contents if isinstance(content, list) for part in content if _is_image(part)]
        if images := [part for part in parts if any(part.get(inner) not in _NOTHING for inner in _INSIDE)]:
            return images
    return []


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def _image(value: Any, key: str) -> tuple[str, bytes | None]:
    """An image's name, and its content where it is embedded."""
    while isinstance(value, dict):
        value = next((value[inner] for inner in _INSIDE if value.get(inner) not in (*_NOTHING, b"")), b"")
    if isinstance(value, bytes):
        if not value:
            raise BadRecord("malformed images", f"'{key}' holds an image without content and without a file name")
        return "embedded", value
    if not isinstance(value, str) or not value:
        raise BadRecord(
            "malformed images",
            f"'{key}' holds {type(value).__name__} where an image is expected: a file name, the bytes of a file, "
            "base64, or an object with 'bytes' or 'path'",
        )
    if value.startswith("data:") or (value.startswith(_BASE64) and len(value) >= _SHORTEST_BASE64):
        return "embedded", _decoded(value, key)
    if value.partition("://")[0].lower() in ("http", "https"):
        raise BadRecord(
            "image at a web address",
            f"'{key}' is {value[:200]}: nothing is fetched here; download the images and name their files",
        )
    return (unquote(value.removeprefix("file://")) if value.startswith("file://") else value), None


def _decoded(text: str, key: str) -> bytes:
    """The content of a file in base64 or in a ``data:`` URL."""
    head, _, payload = text.rpartition(",")
    try:
        if head and not head.endswith(";base64"):
            raise ValueError("only data:image/...;base64,... is read")
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecord("corrupt image", f"'{key}' begins with {text[:30]!r} and is damaged ({error})") from error


def read_turns(conversation: Any, system: Any = None) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """Turns from a list of ``{"from", "value"}`` or ``{"role", "content"}``, and notes. ``system`` is a system message
    beside the conversation. An answer before the first question is left out, as in LLaVA."""
    if not isinstance(conversation, list) or not conversation:
        raise BadRecord("no conversation", "the conversation is missing or empty")
    turns = [_turn(message, number) for number, message in enumerate(conversation, start=1)]
    notes: tuple[str, ...] = ()
    if len(turns) > 1 and turns[0].role == "assistant":
        turns, notes = turns[1:], ("answer before the first question left out",)
    return (*_system(system, turns), *turns), notes


def _turn(message: Any, number: int) -> Turn:
    role, text = ("role", "content") if is_chat(message) else ("from", "value")
    said = message.get(text) if isinstance(message, dict) else None
    if isinstance(said, list):
        said = "".join(_part(part, number) for part in said)
    if not isinstance(said, str):
        raise BadRecord("malformed turn", f"turn {number} has no text under '{text}'")
    speaker = message.get(role)
    if not isinstance(speaker, str) or speaker not in ROLE_NAMES:
        raise BadRecord("unknown role", f"turn {number} is spoken by {speaker!r}")
    return Turn(ROLE_NAMES[speaker], said)


def is_chat(message: Any) -> bool:
    """Whether a message has its speaker under ``role``, as chat templates expect, and not under ``from``."""
    return isinstance(message, dict) and message.get("role") is not None


def _part(part: Any, number: int) -> str:
    """A part of a message's content as text."""
    kind = part.get("type") if isinstance(part, dict) else None
    if _is_image(part):
        return IMAGE_MARK
    if kind == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    raise BadRecord("malformed turn", f"turn {number} has a part of type {kind!r}; expected text or image")


def _system(text: Any, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The system message beside a conversation as a turn of its own."""
    if text is None or text == "":
        return ()
    if not isinstance(text, str):
        raise BadRecord("malformed turn", "'system' is no text")
    if turns[0].role == "system":
        raise BadRecord("two system messages", "one under 'system' and one in the conversation")
    return (Turn("system", text),)


def images_before_text(turns: tuple[Turn, ...], images: Images) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """Chat messages without image positions, with all images before the first question, and notes. TRL
    reads such records so (``prepare_multimodal_messages``)."""
    if not images.names or any(IMAGE_MARK in turn.text for turn in turns):
        return turns, ()
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return turns, ()
    marked = Turn("user", f"{IMAGE_MARK * len(images.names)}\n{turns[first].text}")
    return (*turns[:first], marked, *turns[first + 1 :]), ("images put before the first question",)
