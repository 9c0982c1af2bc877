"""Records on disk: one Arrow stream, written in a fixed layout so that equal records are equal bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from mmpipe.data.records import AnyRecord, PreferenceRecord, Record, Turn
from mmpipe.errors import ArtifactError

if TYPE_CHECKING:
    import datasets

_TURN = pa.struct([pa.field("role", pa.string()), pa.field("text", pa.string())])
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("images", pa.list_(pa.string())),
        pa.field("turns", pa.list_(_TURN)),
        pa.field("chosen", pa.string()),
        pa.field("rejected", pa.string()),
    ]
)
_ROWS_PER_BATCH = 1024


def write_records(path: Path, records: Iterable[AnyRecord]) -> int:
    """Write records in their order; returns how many.

    Of a preference record ``turns`` holds the prompt; of others ``chosen`` and ``rejected`` are null.
    """
    count = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        rows = map(_row, records)
        while batch := list(islice(rows, _ROWS_PER_BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))
            count += len(batch)
    return count


def _row(record: AnyRecord) -> dict[str, Any]:
    turns = record.prompt if isinstance(record, PreferenceRecord) else record.turns
    return {
        "id": record.id,
        "source": record.source,
        "images": list(record.images),
        "turns": [{"role": turn.role, "text": turn.text} for turn in turns],
        "chosen": record.chosen if isinstance(record, PreferenceRecord) else None,
        "rejected": record.rejected if isinstance(record, PreferenceRecord) else None,
    }


class RecordTable:
    """The records of a file, memory mapped: quick to open however many there are, shared by all workers."""

    def __init__(self, path: Path) -> None:
        import datasets

        self.path = path
        try:
            self._table: datasets.Dataset = datasets.Dataset.from_file(str(path))
        except (OSError, pa.ArrowInvalid) as error:
            raise ArtifactError(f"{path}: no file of records ({error}); build the mixture again") from error
        if missing := set(SCHEMA.names) - set(self._table.column_names):
            raise ArtifactError(f"{path}: the columns {sorted(missing)} are missing; build the mixture again")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> AnyRecord:
        row = self._table[index]
        turns = tuple(Turn(turn["role"], turn["text"]) for turn in row["turns"])
        identity = row["id"], row["source"], tuple(row["images"])
        if row["chosen"] is not None:
            return PreferenceRecord(*identity, turns, row["chosen"], row["rejected"])
        return Record(*identity, turns)

    def __iter__(self) -> Iterator[AnyRecord]:
        return (self[index] for index in range(len(self)))
