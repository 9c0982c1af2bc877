"""Archives to unpack, and entries fetched as the rule fetches them."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from mmpipe.artifacts import manifest
from mmpipe.settings import validate
from mmpipe.sources import source_type
from mmpipe.sources.base import Source

MEMBERS = {"images/a.jpg": b"a" * 5000, "images/deep/b.jpg": bytes(range(256)) * 30, "list.json": b"[]"}


def make_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as bundle:
        for name, content in members.items():
            bundle.writestr(zipfile.ZipInfo(name) if not compression else name, content)
    return path


def make_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as bundle:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
    return path


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def entry(**settings: Any) -> Source:
    return validate(source_type(), settings, "test")


def fetched(source: Source, name: str = "thing", **lock: Any) -> dict[str, Any]:
    """What the rule does: fetch, then write the manifest."""
    out = Path("resources/datasets", name)
    out.mkdir(parents=True, exist_ok=True)  # as Snakemake does
    (out / manifest.NAME).unlink(missing_ok=True)
    facts = source.fetch(out, lock)
    return manifest.write(out, kind="source", spec='{"a":1}', inputs={}, **facts)


def published(name: str = "thing") -> dict[str, bytes]:
    found = tree(Path("resources/datasets", name))
    found.pop(manifest.NAME, None)
    return found
