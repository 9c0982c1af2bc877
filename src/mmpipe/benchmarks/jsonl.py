"""Reading files of benchmarks and answers from any source, and writing our own.

Byte-order marks, CRLF, ids as numbers or strings are accepted; unreadable content is an error that names
file and line.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import not_text, write_text
from mmpipe.errors import DataError

JsonDict = dict[str, Any]
"""A JSON object: a question, a reference, an answer or a table row."""


class Document(NamedTuple):
    """A parsed file; ``name`` is for messages, and for official names that identify the content."""

    name: str
    content: Any


csv.field_size_limit(2**31 - 1)  # a cell may hold an image

_NO_VALUE = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"]
    + ["<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null", "none"]
)


def is_missing(value: Any) -> bool:
    """Whether a table cell holds no value, by the spellings pandas reads as "not available" (and ``none``)."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or value in _NO_VALUE


def read_document(path: Path) -> Document:
    """Parse one file by its content: JSON, JSON lines, a table (``.tsv``, ``.csv``, ``.parquet``, a folder of parquet
    files). JSON lines become a list, tables a list of records.

    Raises DataError when the file is missing or is none of these, ArtifactError when it is part of an artifact and damaged.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file")
    manifest.check(path)
    return Document(path.as_posix(), _content(path))


def read_table(path: Path) -> Iterator[JsonDict]:
    """Rows of a TSV or CSV file with a header, one at a time; every value is text.

    Raises DataError for an empty file, a row of another length than the header, or bytes that are not UTF-8.
    """
    _refuse_binary(path, "a table as text")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            header = next(reader, None)
            if not header:
                raise DataError(f"{path}: the file is empty; a header line was expected")
            for row in reader:
                if row and len(row) != len(header):
                    where = f"{path}, line {reader.line_num}"
                    raise DataError(f"{where}: {len(row)} cells where the header has {len(header)}")
                if row:
                    yield dict(zip(header, row, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {reader.line_num}: not a readable table ({error})") from error


def iter_rows(path: Path) -> Iterator[JsonDict]:
    """Rows of a table with images, one at a time: TSV, CSV, JSON (lines), parquet, or a folder of parquet files.

    Raises DataError for anything else.
    """
    for part in _parts(path):
        if part.suffix.lower() in (".tsv", ".csv"):
            yield from read_table(part)
        elif part.suffix.lower() == ".parquet":
            yield from parquet_rows(part)
        else:
            yield from records_of([read_document(part)])


def _parts(path: Path) -> list[Path]:
    """The file itself, or the parquet files of a folder. Raises DataError for a folder without any."""
    parts = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not parts:
        raise DataError(f"{path}: the folder holds no parquet files")
    return parts


def parquet_rows(path: Path, columns: Sequence[str] | None = None, optional: Sequence[str] = ()) -> Iterator[JsonDict]:
    """Rows of a parquet file or of a folder of them, with ``columns`` and the existing ones of ``optional``, or
    whole.

    Raises DataError, before any row is read, when a file lacks one of ``columns`` or is no parquet.
    """
    import pyarrow
    import pyarrow.parquet

    for part in _parts(path):
        try:
            with pyarrow.parquet.ParquetFile(part) as file:
                found = file.schema_arrow.names
                lacking = [name for name in columns or () if name not in found]
                if lacking:
                    raise DataError(f"{part}: the table lacks {', '.join(lacking)} (it has {', '.join(found)})")
                wanted = None if columns is None else [name for name in (*columns, *optional) if name in found]
                for batch in file.iter_batches(batch_size=64, columns=wanted):
                    # a batch without columns still has rows
                    yield from batch.to_pylist() if batch.num_columns else ({} for _ in range(batch.num_rows))
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(f"{part}: not a readable parquet file ({error})") from error


def without_images(record: JsonDict) -> JsonDict:
    """The record without values that hold the bytes of an image."""
    return {
        name: value
        for name, value in record.items()
        if not isinstance(value, bytes) and not (isinstance(value, dict) and "bytes" in value)
    }


def key(value: Any) -> str:
    """One spelling for an id that files write as a number or as a string."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def numbered(records: Sequence[JsonDict]) -> list[JsonDict]:
    """The records with their ``question_id``: their own, their ``id`` or ``index``, or else their position."""
    names = ("question_id", "questionId", "qid", "pid", "id", "index")
    return [{"question_id": next((r[n] for n in names if n in r), place), **r} for place, r in enumerate(records)]


def listed(content: Any, id_field: str) -> Any:
    """``{id: record}`` as a list of records with their ids; anything else as it is."""
    if isinstance(content, dict) and all(isinstance(record, dict) for record in content.values()):
        return [{id_field: number, **record} for number, record in content.items()]
    return content


def require(record: JsonDict, fields: Iterable[str], where: str) -> None:
    """Raise DataError, opened by ``where``, naming the fields that ``record`` lacks."""
    lacking = [name for name in fields if name not in record]
    if lacking:
        has = ", ".join(map(str, record)) or "nothing"
        raise DataError(f"{where}: a record lacks {', '.join(lacking)} (it has {has})")


def records_of(documents: Sequence[Document], fields: Sequence[str] = ()) -> list[JsonDict]:
    """The records of documents that are lists of records, each with the given fields.

    Raises DataError when something else is found.
    """
    records: list[JsonDict] = []
    for document in documents:
        if not isinstance(document.content, list) or not all(isinstance(r, dict) for r in document.content):
            found = type(document.content).__name__
            raise DataError(f"{document.name}: expected a list of records, found {found}")
        for record in document.content:
            require(record, fields, document.name)
        records += document.content
    return records


def read_answers(paths: Sequence[Path]) -> list[JsonDict]:
    """The answers of one or more JSON-lines files, each with ``question_id`` and ``text``.

    Raises DataError for a line that is no such record.
    """
    answers = []
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: there is no such file")
        for number, answer in enumerate(_answers_in(path), start=1):
            where = f"{path}, record {number}"
            if not isinstance(answer, dict):
                found = type(answer).__name__
                raise DataError(f"{where}: an answer is an object with 'question_id' and 'text', found a {found}")
            if "question_id" not in answer:
                has = ", ".join(map(str, answer)) or "nothing"
                raise DataError(f"{where}: an answer needs 'question_id' and 'text' (it has {has})")
            if not isinstance(answer.get("text"), str):
                raise DataError(f"{where} (question {answer['question_id']!r}): 'text' must be a string")
            answers.append(answer)
    return answers


def _answers_in(path: Path) -> Iterator[Any]:
    """The values of JSON lines, or the elements of one JSON array."""
    text = _text(path)
    try:
        whole = json.loads(text) if text.lstrip().startswith("[") else None
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    return iter(whole) if isinstance(whole, list) else _json_lines(text, path)


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


def _refuse_binary(path: Path, expected: str) -> None:
    if kind := not_text(path):
        raise DataError(f"{path}: not {expected}, but {kind}")


def _text(path: Path) -> str:
    try:
        _refuse_binary(path, "JSON")
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
