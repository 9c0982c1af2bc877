"""A mixture on disk: Arrow streams of its records and of its images' digests; equal content gives equal bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from mmpipe.artifacts import manifest
from mmpipe.data.images import content_digest
from mmpipe.data.records import AnyRecord, PreferenceRecord, Record, Turn
from mmpipe.errors import ArtifactError, DataError

if TYPE_CHECKING:
    import datasets

_TEXT = pa.string()
_TURNS = pa.list_(pa.struct({"role": _TEXT, "text": _TEXT}))
SCHEMA = pa.schema(
    {"id": _TEXT, "source": _TEXT, "images": pa.list_(_TEXT), "turns": _TURNS, "chosen": _TEXT, "rejected": _TEXT}
)
_ROWS_PER_BATCH = 1024

RECORDS = "records.arrow"
IMAGES = "images.arrow"
_FORMER_IMAGES = "pictures.arrow"
_DIGESTS = pa.schema({"name": _TEXT, "digest": pa.binary(16)})
_DIGESTS_PER_BATCH = 4096


class ArrowWriter(AbstractContextManager["ArrowWriter"]):
    """Writes rows of one schema as an Arrow stream, in batches of ``size``."""

    def __init__(self, path: Path, schema: pa.Schema, size: int) -> None:
        self.schema, self.size, self.count = schema, size, 0
        self._rows: list[dict[str, Any]] = []
        with ExitStack() as opened:
            sink = opened.enter_context(pa.OSFile(str(path), "wb"))
            self._writer: Any = opened.enter_context(pa.ipc.new_stream(sink, schema))
            self._opened = opened.pop_all()

    def add(self, row: dict[str, Any]) -> None:
        """Write one row."""
        self._rows.append(row)
        self.count += 1
        if len(self._rows) == self.size:
            self._flush()

    def __exit__(self, *error: object) -> None:
        with self._opened:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=self.schema))
            self._rows = []


def write_records(path: Path, records: Iterable[AnyRecord]) -> int:
    """Write records in their order; returns how many. Of a preference record ``turns`` holds the prompt; of others
    ``chosen`` and ``rejected`` are null."""
    with ArrowWriter(path, SCHEMA, _ROWS_PER_BATCH) as writer:
        for record in records:
            writer.add(_row(record))
    return writer.count


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
    """The records of a file, memory mapped: fast to open, shared by all workers. Raises ArtifactError when it is damaged;
    its hash is not compared when it is ``checked`` already."""

    def __init__(self, path: Path, *, checked: bool = False) -> None:
        import datasets

        self.path = path
        if not checked:
            manifest.check(path)
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


def digest_writer(path: Path) -> ArrowWriter:
    """Writes ``name`` and ``digest`` of images, in the order they are added."""
    return ArrowWriter(path, _DIGESTS, _DIGESTS_PER_BATCH)


def read_digests(mixture: Path) -> Iterator[tuple[str, bytes]]:
    """Name and digest of every image of a mixture; memory does not grow with their number."""
    path = mixture / IMAGES
    if not path.exists():
        path = mixture / _FORMER_IMAGES
    manifest.check(path)
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
        for batch in stream:
            yield from zip(batch.column("name").to_pylist(), batch.column("digest").to_pylist(), strict=True)


class ImageDigests:
    """The digests of a mixture's images, to check each when it is read: 24 bytes an image, in arrays that the workers of a
    data loader share."""

    def __init__(self, mixture: Path) -> None:
        self.mixture = mixture
        pairs = [(_number(name), digest) for name, digest in read_digests(mixture)]
        numbers = np.array([number for number, _ in pairs], dtype=np.uint64)
        order = np.argsort(numbers)
        self._numbers = numbers[order]
        self._digests = np.array([digest for _, digest in pairs], dtype="V16")[order]

    def read(self, name: str) -> bytes:
        """The content of an image. Raises DataError when it cannot be read, or is another one than was verified."""
        try:
            content = Path(name).read_bytes()
        except OSError as error:
            raise DataError(f"{name}: the image cannot be read ({error.strerror})") from error
        at = int(np.searchsorted(self._numbers, np.uint64(_number(name))))
        if at < len(self._numbers) and self._numbers[at] == _number(name):
            expected, found = self._digests[at].tobytes(), content_digest(content)
            if found != expected:
                raise DataError(
                    f"{name}: damaged or changed: the content has the digest {found.hex()}, but {self.mixture / IMAGES} "
                    f"lists {expected.hex()}; restore the file from a copy, or fetch the data set again"
                )
        return content


def _number(name: str) -> int:
    """64 bits that stand for a name."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest())
