"""Paths of a benchmark's official files and the hub's parquet tables, and decoding of their images."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import find_name, leaves_folder
from mmpipe.benchmarks.jsonl import JsonDict, parquet_rows
from mmpipe.errors import DataError

_SIGNATURES = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"RIFF", "webp"))


@dataclass(frozen=True)
class BenchmarkFiles:
    """The official files of a benchmark: names by role, below one folder."""

    root: Path
    files: Mapping[str, str] = field(default_factory=dict)

    def path(self, role: str) -> Path:
        """The file (or folder) that plays ``role``. Raises DataError when it does not exist."""
        path = self.inside(self.files[role])
        if not path.exists():
            raise DataError(
                f"{path}: the file with the '{role}' is not there; name it under 'files' in benchmarks.yaml"
            )
        return path

    def has(self, role: str) -> bool:
        """Whether the file that plays ``role`` exists."""
        return role in self.files and self.inside(self.files[role]).exists()

    def image(self, name: str, role: str = "images") -> Path:
        """The image ``name`` below the folder that plays ``role``.

        Raises DataError when the name leads outside or the file does not exist.
        """
        path = self.inside(f"{self.files[role]}/{name}")
        if not path.is_file():
            raise DataError(f"{path}: the image is not there; is the archive of the '{role}' unpacked?")
        return path

    def inside(self, name: str) -> Path:
        """``root / name``, for names that come from data. Raises DataError for absolute names and names with ``..``."""
        if leaves_folder(name):
            raise DataError(f"{self.root}: the name '{name}' leads outside of the data set")
        return find_name(self.root, name)

    @property
    def on_hub(self) -> bool:
        """Whether the hub's table (role ``parquet``) is to be read: it exists and the first official file does not."""
        return self.has("parquet") and not self.has(next(iter(self.files)))

    def hub_rows(self, columns: Sequence[str], optional: Sequence[str] = ()) -> list[JsonDict]:
        """The rows of the hub's table; image columns are not read. Raises DataError when one of ``columns`` lacks."""
        return list(parquet_rows(self.path("parquet"), columns, optional))

    def hub_images(
        self, column: str = "image", role: str = "parquet", optional: bool = False
    ) -> Iterator[bytes | None]:
        """The images of the hub's table, one a row; with ``optional`` None for rows and files without one.

        Raises DataError for a row without image otherwise.
        """
        path = self.path(role)
        for place, row in enumerate(parquet_rows(path, *((), [column]) if optional else ([column],))):
            value = row.get(column)
            yield None if optional and value is None else image_bytes(value, f"{path}, row {place}")


def decode_base64(text: str, where: str) -> bytes:
    """The bytes of a base64 image. Raises DataError, opened by ``where``, when it is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: the image is not base64 ({error})") from error


def image_bytes(value: Any, where: str) -> bytes:
    """The bytes of an image column: base64 text, bytes, or the hub's ``{"bytes": ..., "path": ...}``.

    Raises DataError, opened by ``where``, when there are none.
    """
    if isinstance(value, str):
        return decode_base64(value, where)
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise DataError(f"{where}: the image column holds no bytes")
    return content


def extension(content: bytes, where: str) -> str:
    """File extension by the signature of the content. Raises DataError, opened by ``where``, for other formats."""
    for signature, name in _SIGNATURES:
        if content.startswith(signature):
            return name
    raise DataError(f"{where}: not a JPEG, PNG, GIF, BMP or WebP image")
