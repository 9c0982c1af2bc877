"""Which images a mixture holds: ``images.arrow``, the name and the digest of every file, written as they are found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa

IMAGES = "images.arrow"
_SCHEMA = pa.schema([pa.field("name", pa.string()), pa.field("digest", pa.binary(16))])
_ROWS = 4096


class DigestWriter(AbstractContextManager["DigestWriter"]):
    """Writes a row an image, in the order they are added."""

    def __init__(self, path: Path) -> None:
        self._names: list[str] = []
        self._digests: list[bytes] = []
        with ExitStack() as opened:
            sink = opened.enter_context(pa.OSFile(str(path), "wb"))
            self._writer: Any = opened.enter_context(pa.ipc.new_stream(sink, _SCHEMA))
            self._opened = opened.pop_all()

    def add(self, name: str, digest: bytes) -> None:
        """Write one image; nothing is asked about those before."""
        self._names.append(name)
        self._digests.append(digest)
        if len(self._names) == _ROWS:
            self._flush()

    def __exit__(self, *error: object) -> None:
        with self._opened:
            self._flush()

    def _flush(self) -> None:
        if self._names:
            columns = [pa.array(self._names), pa.array(self._digests, pa.binary(16))]
            self._writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
            self._names, self._digests = [], []


def read_digests(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and digest of every image; memory does not grow with their number."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
        for batch in stream:
            yield from zip(batch.column("name").to_pylist(), batch.column("digest").to_pylist(), strict=True)
