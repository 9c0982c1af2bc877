"""What all formats share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

from mmpipe.data.json_stream import read_values
from mmpipe.data.records import BadRecord, PreferenceRecord, Record, Role, Turn

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
    record: Record | PreferenceRecord | None = None
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


def drafts(
    path: Path, make: Callable[[str, Mapping[str, Any], list[str]], Record | PreferenceRecord]
) -> Iterator[Draft]:
    """Drafts of the objects in a JSON or JSON-lines file.

    ``make(id, entry, notes)`` returns the record or raises BadRecord, and appends to ``notes`` what it put
    right. An entry without an id is called after the file and its number in it.
    """
    for number, (line, entry) in enumerate(read_values(path)):
        record_id = f"{path.stem}-{number}"
        notes: list[str] = []
        try:
            if not isinstance(entry, dict):
                raise BadRecord("not a record", f"line {line} holds no JSON object")
            record_id = str(entry["id"]) if entry.get("id") not in (None, "") else record_id
            yield Draft(record_id, make(record_id, entry, notes), notes=tuple(notes))
        except BadRecord as fault:
            yield Draft(record_id, fault=BadRecord(fault.reason, f"{fault.detail} ({path}, line {line})"))


def image_names(entry: Mapping[str, Any], key: str = "image") -> tuple[str, ...]:
    """File names of pictures under ``key``: a name, a list of names, or nothing."""
    value = entry.get(key)
    names = [] if value in (None, "") else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise BadRecord("malformed pictures", f"'{key}' is neither a file name nor a list of file names")
    return tuple(names)


def read_turns(
    conversation: Any, notes: list[str], role: str = "from", text: str = "value"
) -> tuple[Turn, ...]:
    """Turns from a list of ``{role: ..., text: ...}``; an answer before the first question is left out."""
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
        notes.append("answer before the first question left out")
        return tuple(turns[1:])
    return tuple(turns)
