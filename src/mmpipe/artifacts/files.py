"""Atomic files."""

from __future__ import annotations

import csv
import errno
import glob
import hashlib
import io
import json
import os
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from mmpipe.errors import ArtifactError
from mmpipe.escapes import csv_cell


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """JSON that is equal for equal values: sorted keys, no blanks, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, to the disk."""
    with _named(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of writing name the file: those of a full disk come from a descriptor, without its name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def apply_umask(path: Path) -> None:
    """Set a file's mode by the umask: safetensors makes files that only their owner can read. Links stay as they are, with
    the files of others that they may lead to."""
    if path.is_symlink() or path.stat().st_nlink > 1:
        return
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


@contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file for writing that gets the name ``path`` only on success."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            with _named(path):
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        with suppress(OSError):  # the error of writing is the one to show
            temporary.unlink(missing_ok=True)


def move(origin: Path, target: Path) -> None:
    """Give a file its final name atomically, on another file system too, where it has to be copied."""
    try:
        os.replace(origin, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy_file(origin, target)


def copy_file(origin: Path, target: Path) -> None:
    """Copy a file's content to ``target`` atomically."""
    with atomic_open(target) as file, origin.open("rb") as whole:
        shutil.copyfileobj(whole, file)


def link_or_copy(origin: Path, target: Path) -> None:
    """Make ``target`` the same file: a hard link takes no space; across file systems it has to be a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(origin.resolve(), target)
    except OSError:
        copy_file(origin, target)


def store_by_content(
    content: bytes, folder: Path, suffix: str, *, digits: int = 32, nested: bool = False, origin: Path | None = None
) -> str:
    """Store content as ``<sha256><suffix>`` in ``folder``, equal ones once; returns its name relative to the folder.
    ``digits`` of the hash are taken; ``nested`` puts the file into a folder of its first two. ``origin`` is a file of
    this content, to be linked."""
    digest = hashlib.sha256(content).hexdigest()[:digits]
    name = f"{digest[:2]}/{digest}{suffix}" if nested else f"{digest}{suffix}"
    path = folder / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if origin is None:
            path.write_bytes(content)
        else:
            link_or_copy(origin, path)
    return name


def leaves_folder(name: str) -> bool:
    """Whether an untrusted name leads out of the folder it is relative to; backslashes count as slashes.

    >>> [leaves_folder(name) for name in ("a/b.png", "..b", "/etc", "a/../../b", "C\\\\..\\\\b")]
    [False, False, True, True, True]
    """
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or "\x00" in name


def find_name(folder: Path, name: str) -> Path:
    """The file ``name`` below ``folder``, also where the folder has it in the other Unicode normal form: archives made
    on a Mac hold ``é`` as two code points. The path as given where there is none. Raises OSError as ``is_file`` does."""
    if name.isascii():
        return folder / name
    forms = (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))
    return next((folder / form for form in forms if (folder / form).exists()), folder / name)


_SIGNATURES = {
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"BZh": "compressed by bzip2; unpack it",
    b"\xfd7zXZ": "compressed by xz; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard; unpack it",
    b"PK\x03\x04": "a ZIP archive, which Excel workbooks (xlsx) are too; unpack it, or export the sheet as CSV or JSON",
    b"\xd0\xcf\x11\xe0": "an Office file such as xls; export it as CSV or JSON",
    b"PAR1": "a Parquet table; give it a name that ends with .parquet where a table is read, or export it as JSON",
    b"%PDF": "a PDF document",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
    b"SQLite format 3": "an SQLite database; export it as CSV or JSON",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
}


def not_text(path: Path) -> str | None:
    """What a file is by its first bytes, and what to do with it, where text was expected; None for anything else."""
    with path.open("rb") as file:
        head = file.read(max(map(len, _SIGNATURES)))
    return next((kind for signature, kind in _SIGNATURES.items() if head.startswith(signature)), None)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_open(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Write readable JSON atomically, keys in the order given unless ``sort_keys``."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys) + "\n")


_FORMER_WORDS = {
    "equal_pictures": "equal_images",
    "picture": "image",
    "picture_flops": "image_flops",
    "picture_seconds": "image_seconds",
    "picture_tokens": "image_tokens",
    "pictures": "images",
    "shared_pictures": "shared_images",
    "tokens_per_picture": "tokens_per_image",
    "without_picture_by_folder": "without_image_by_folder",
}
"""Keys (and measures of efficiency) in artifacts of earlier versions, and their names today."""


class DamagedJson(ArtifactError, ValueError):
    """A file that should be JSON is not, or holds something else than expected."""


def read_json(path: Path, **options: Any) -> Any:
    """Read a JSON file; ``options`` are those of ``json.loads``. Raises DamagedJson."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), **options)
    except (ValueError, RecursionError) as error:
        raise DamagedJson(f"{path}: not JSON ({error}); restore the file, or delete it and make it again") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object. Raises DamagedJson."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise DamagedJson(
            f"{path}: expected a JSON object, found a {type(content).__name__}; restore the file, or delete it and make it again"
        )
    return content


def read_report(path: Path) -> Any:
    """Read the report or settings of an artifact; keys of earlier versions get their names of today. Raises DamagedJson."""
    return read_json(path, object_hook=_in_todays_words)


def _in_todays_words(mapping: dict[str, Any]) -> dict[str, Any]:
    renamed = {_FORMER_WORDS.get(key, key): value for key, value in mapping.items()}
    if isinstance(measure := renamed.get("measure"), str):
        renamed["measure"] = _FORMER_WORDS.get(measure, measure)
    return renamed


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file that this project wrote itself."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def json_line(row: Any) -> bytes:
    """A row of JSON Lines in ASCII, so that broken Unicode can be stored too."""
    return json.dumps(row).encode("ascii") + b"\n"


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON Lines atomically."""
    with atomic_open(path) as file:
        file.writelines(map(json_line, rows))


def recover_lines(path: Path, is_row: Callable[[bytes], bool] = bool) -> list[bytes]:
    """The lines of a file that a process may have been killed while appending to; none without the file. A line without
    its end, and lines before it that are no rows, are cut off the end of the file."""
    content = path.read_bytes() if path.exists() else b""
    lines = content.split(b"\n")[:-1]
    while lines and not is_row(lines[-1]):
        lines.pop()
    whole = sum(len(line) + 1 for line in lines)
    if whole < len(content):
        os.truncate(path, whole)
    return lines


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table atomically, the columns of the first row; fractions with six digits, formulas as text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else csv_cell(v) for k, v in row.items()})
    write_text(path, text.getvalue())


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A fresh directory beside ``target`` whose files move into ``target`` on success.

    Files of an earlier version that the new one lacks are removed. The move is file by file (Snakemake may have made
    ``target`` already), ``manifest.json`` last: a manifest implies all files that it lists.
    Leftovers of a killed process are removed first; two processes never make the same artifact at once.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    for left_over in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        files = sorted(path.relative_to(stage) for path in stage.rglob("*") if path.is_file())
        for name in files:
            apply_umask(stage / name)
            sync(stage / name)
        (target / "manifest.json").unlink(missing_ok=True)
        if target.is_dir():
            for old in sorted(target.rglob("*"), reverse=True):
                if old.is_file() and old.relative_to(target) not in files:
                    old.unlink()
        for name in sorted(files, key=lambda name: name == Path("manifest.json")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            move(stage / name, target / name)
        sync(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
