"""Reading the files of benchmarks and answers, which others wrote, and writing our own.

Byte-order marks, CRLF, ids as numbers or strings are accepted; what cannot be read is an error that names
file and line.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmpipe.artifacts.files import write_text
from mmpipe.errors import DataError

Record = dict[str, Any]


class Document(NamedTuple):
    """A parsed file; ``name`` is for messages, and for official names that say what the file holds."""

    name: str
    content: Any


csv.field_size_limit(2**31 - 1)  # a cell may hold an image

_NO_VALUE = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"]
    + ["<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null", "none"]
)


def is_missing(value: Any) -> bool:
    """Whether a table cell holds no value, by the spellings pandas takes for "not available" (and
    ``none``)."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or value in _NO_VALUE


def read_document(path: Path) -> Document:
    """Parse one file by its content: JSON, JSON lines, a table (``.tsv``, ``.csv``, ``.parquet``,
    a folder of parquet files).

    JSON lines become a list, tables a list of records.
    Raises DataError when the file is missing or is none of these.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file")
    return Document(path.as_posix(), _content(path))


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """Parse every file; see ``read_document``."""
    return [read_document(path) for path in paths]


def read_table(path: Path) -> Iterator[Record]:
    """Rows of a TSV or CSV file with a header, one at a time; every value is text.

    Raises DataError for an empty file, a row of another length than the header, or bytes that are not UTF-8.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            header = next(reader, None)
            if not header:
                raise DataError(f"{path}: the file is empty; a header line was expected")
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(row)} cells where the header has {len(header)}"
                    )
                yield dict(zip(header, row, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {reader.line_num}: not a readable table ({error})") from error


def iter_rows(path: Path) -> Iterator[Record]:
    """Rows of a table with images, one at a time: TSV, CSV, JSON (lines), parquet, or a folder of parquet
    files.

    Raises DataError for anything else.
    """
    parts = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not parts:
        raise DataError(f"{path}: the folder holds no parquet files")
    for part in parts:
        if part.suffix.lower() in (".tsv", ".csv"):
            yield from read_table(part)
        elif part.suffix.lower() == ".parquet":
            yield from _parquet_rows(part)
        else:
            content = read_document(part).content
            if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
                raise DataError(f"{part}: expected a list of records")
            yield from content


def parquet_rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Record]:
    """Rows of a parquet file or of a folder of them, with ``columns`` and those of ``optional`` that there are.

    Raises DataError, before any row is read, when a file lacks one of ``columns`` or is no parquet.
    """
    parts = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not parts:
        raise DataError(f"{path}: the folder holds no parquet files")
    for part in parts:
        found = _parquet_columns(part)
        lacking = [name for name in columns if name not in found]
        if lacking:
            raise DataError(f"{part}: the table lacks {', '.join(lacking)} (it has {', '.join(found)})")
        yield from _parquet_rows(part, [name for name in (*columns, *optional) if name in found])


def without_images(record: Record) -> Record:
    """The record without values that hold the bytes of an image."""
    return {
        name: value
        for name, value in record.items()
        if not isinstance(value, bytes) and not (isinstance(value, dict) and "bytes" in value)
    }


def read_answers(paths: Sequence[Path]) -> list[Record]:
    """The answers of one or more JSON-lines files, each with ``question_id`` and ``text``.

    Raises DataError for a line that is no such record.
    """
    answers = []
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: there is no such file")
        for number, answer in enumerate(_json_lines(_text(path), path), start=1):
            if not isinstance(answer, dict) or "question_id" not in answer:
                raise DataError(f"{path}, record {number}: an answer needs 'question_id' and 'text'")
            if not isinstance(answer.get("text"), str):
                raise DataError(
                    f"{path}, record {number} (question {answer['question_id']!r}): 'text' must be a string"
                )
            answers.append(answer)
    return answers


def write_document(path: Path, value: Any, indent: int | None = None) -> None:
    """Write one JSON document atomically, in ASCII."""
    write_text(path, json.dumps(value, indent=indent))


def _content(path: Path) -> Any:
    suffix = path.suffix.lower()
    if path.is_dir() or suffix == ".parquet":
        return [without_images(row) for row in iter_rows(path)]
    if suffix in (".tsv", ".csv"):
        return list(read_table(path))
    text = _text(path)
    if suffix == ".jsonl":
        return list(_json_lines(text, path))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" and text.count("\n", 0, -1) == 0:
            raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply") from error
    return list(_json_lines(text, path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _json_lines(text: str, path: Path) -> Iterator[Any]:
    # not splitlines(): replies may hold line separators such as U+2028
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not a JSON record ({error})") from error


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_schema(path).names)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def _parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64, columns=columns):
                # a batch without columns still has rows
                yield from batch.to_pylist() if batch.num_columns else ({} for _ in range(batch.num_rows))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error
