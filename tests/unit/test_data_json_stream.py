from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmpipe.data import json_stream
from mmpipe.data.json_stream import read_values
from mmpipe.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(VALUES, max_size=5),
    chunk=st.integers(1, 40),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 2]),
)
def test_any_array_is_read_from_any_chunks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, values: list[Any], chunk: int, ascii_only: bool, indent: int | None
) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    text = json.dumps(values, ensure_ascii=ascii_only, indent=indent)
    path = folder / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert [value for _, value in read_values(path)] == values


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), min_size=1, max_size=5),
    chunk=st.integers(1, 40),
)
def test_any_lines_are_read_from_any_chunks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, values: list[Any], chunk: int
) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    path = folder / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(value) for value in values), newline="\r\n")
    read = list(read_values(path))
    assert read == [(2 * number + 1, value) for number, value in enumerate(values)]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(VALUES, min_size=1, max_size=4), chunk=st.integers(1, 40), data=st.data())
def test_a_truncated_array_is_always_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, values: list[Any], chunk: int, data: st.DataObject
) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    text = json.dumps(values)
    path = folder / "cut.json"
    path.write_text(text[: data.draw(st.integers(0, len(text) - 1))])
    with pytest.raises(DataError, match="not valid JSON"):
        list(read_values(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1, column 1: not valid JSON, the file is empty"),
        ('[{"a": 1},\n {"a": 2}', "line 2, column 10: not valid JSON, the array ends too early"),
        ('[{"a": 1}\n {"a": 2}]', "line 2, column 2: not valid JSON, expected ',' or ']'"),
        ("[1, 2]\n[3]", "line 2, column 1: not valid JSON, there is text after the end"),
        ('{"a": 1}\n{"a": oops}\n', "line 2, column 7: not valid JSON, Expecting value"),
        ('[{"a": "x\ny"}]', "line 1, column 10: not valid JSON, Invalid control character"),
        ("[1,]", "line 1, column 4: not valid JSON, Expecting value"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_errors_name_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        list(read_values(path))
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_values_before_a_fault_are_given(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a')
    values = read_values(path)
    assert [next(values)[1], next(values)[1]] == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match="line 3"):
        next(values)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert list(read_values(path)) == [(1, 1)]


def test_only_a_part_of_the_file_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK", 1000)
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"text": "x" * 90}] * 5000))
    lengths = []
    for _ in json_stream._array(window := _window(path)):
        lengths.append(len(window._text))
    assert len(lengths) == 5000
    assert max(lengths) < 3000


def _window(path: Path) -> json_stream._Window:
    window = json_stream._Window(path, path.open(encoding="utf-8"))
    assert window.peek() == "["
    return window
