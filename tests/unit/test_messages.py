"""Messages name what is wrong: not the nearest thing to it."""

from __future__ import annotations

import bz2
import gzip
import json
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from data_records import char_tokenizer, data_set, encoder, entry, in_tokens, mix, said
from data_records import image as make_image
from transformers import AutoConfig, AutoModel

from mmpipe.benchmarks.jsonl import read_answers, read_document
from mmpipe.benchmarks.readers import BenchmarkFiles
from mmpipe.chat.api import _parse
from mmpipe.data.json_stream import read_values
from mmpipe.data.record_table import RecordTable, write_records
from mmpipe.data.records import Record, Turn
from mmpipe.data.spec import MixtureSourceSpec
from mmpipe.errors import ConfigError, DataError, MmpipeError
from mmpipe.models.llava import image_tokens
from mmpipe.settings import validate

TOWERS: dict[str, tuple[dict[str, Any], int]] = {
    "clip_vision_model": ({}, 1),
    "siglip_vision_model": ({}, 0),
    "dinov2": ({"mlp_ratio": 2}, 1),
    "dinov2_with_registers": ({"mlp_ratio": 2, "num_register_tokens": 4}, 5),
    "vit": ({}, 1),
    "deit": ({}, 2),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_have_the_class_tokens_that_they_have(kind: str) -> None:
    changes, others = TOWERS[kind]
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, image_size=28, patch_size=14, **shape, **changes)
    tower = AutoModel.from_config(config)
    found = tower(torch.zeros(1, 3, 28, 28)).last_hidden_state.shape[1]
    assert image_tokens(config, "full") == found == 4 + others
    if others:
        assert image_tokens(config, "patch") == found - 1
    else:
        with pytest.raises(ConfigError, match=f"'{kind}' has none"):
            image_tokens(config, "patch")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_file_whose_name_is_in_the_other_unicode_form_is_found(form: str, tmp_path: Path) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    data = data_set(tmp_path / "made", [entry(0, unicodedata.normalize(form, "café/gruß é.png"))])
    make_image(data / "img" / unicodedata.normalize(other, "café/gruß é.png"))
    mix(data, tmp_path / "out")
    (record,) = RecordTable(tmp_path / "out/records.arrow")
    assert Path(record.images[0]).is_file()
    files = BenchmarkFiles(data, {"images": "img"})
    assert files.image(unicodedata.normalize(form, "café/gruß é.png")).is_file()
    # two files whose names differ in the form alone are two files
    make_image(data / "img" / unicodedata.normalize(form, "café/gruß é.png"), seed=9)
    mix(data, tmp_path / "out")
    assert RecordTable(tmp_path / "out/records.arrow")[0].images[0].endswith(unicodedata.normalize(form, "gruß é.png"))


def _xlsx(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")


NOT_TEXT = {
    "xlsx": (_xlsx, "Excel workbooks"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"[]")), "compressed by gzip; unpack it"),
    "bzip2": (lambda path: path.write_bytes(bz2.compress(b"[]")), "compressed by bzip2; unpack it"),
    "parquet": (lambda path: path.write_bytes(b"PAR1 and more"), "a Parquet table"),
    "UTF-16": (lambda path: path.write_bytes("[1]".encode("utf-16")), "UTF-16; save it as UTF-8"),
    "Latin-1": (lambda path: path.write_bytes(b'["caf\xe9"]'), "not UTF-8 text"),
}


@pytest.mark.parametrize("kind", NOT_TEXT)
@pytest.mark.parametrize(
    "read", [lambda path: list(read_values(path)), lambda path: read_answers([path]), read_document]
)
def test_files_that_are_no_text_are_called_what_they_are(kind: str, read: Any, tmp_path: Path) -> None:
    write, named = NOT_TEXT[kind]
    for suffix in (".json", ".jsonl"):
        path = tmp_path / f"data{suffix}"
        write(path)
        with pytest.raises(DataError, match=named):
            read(path)


def test_answers_in_an_array_are_read_and_only_a_lack_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    answers = [{"question_id": 1, "text": "a"}, {"question_id": 2, "text": "b"}]
    for indent in (None, 1):
        path.write_text(json.dumps(answers, indent=indent))
        assert read_answers([path]) == answers
    path.write_text(json.dumps([*answers, {"id": 3, "text": "c"}]))
    with pytest.raises(DataError, match=r"record 3: an answer needs 'question_id' and 'text' \(it has id, text\)"):
        read_answers([path])
    path.write_text(json.dumps([answers[0], "b"]))
    with pytest.raises(DataError, match="record 2: an answer is an object with 'question_id' and 'text', found a str"):
        read_answers([path])


def test_raising_max_bad_is_advised_only_where_it_helps(tmp_path: Path) -> None:
    bad = entry(0, conversations=said("", "b"))
    data = data_set(tmp_path / "made", [bad, entry(1), entry(2)])
    with pytest.raises(DataError, match="or raise max_bad of the mixture"):
        mix(data, tmp_path / "out", max_bad=0.1)
    for most in (0.5, 1.0):  # nothing is left: no share of bad records would be enough
        with pytest.raises(DataError, match="1 of 1 records are bad") as error:
            mix(data_set(tmp_path / "none", [bad]), tmp_path / "out", max_bad=most)
        assert "raise max_bad" not in str(error.value)
        assert "fetch it again" in str(error.value)


def test_the_template_is_blamed_only_for_what_it_does(tmp_path: Path) -> None:
    turns = (Turn("user", "What?"), Turn("assistant", "b" * 300))
    write_records(tmp_path / "records.arrow", [Record("a", "made", (), turns)])
    with pytest.raises(DataError, match="longer than the model's positions") as error:
        in_tokens(tmp_path / "records.arrow", encoder(max_positions=200), max_bad=1.0)
    assert "template that belongs" not in str(error.value)
    assert "max_bad of the mixture" not in str(error.value)
    captions = encoder("plain", tokenizer=char_tokenizer(bos=False))
    with pytest.raises(DataError, match="choose the template that belongs to the model"):
        in_tokens(tmp_path / "records.arrow", captions, max_bad=1.0)


def request(content: Any, **more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}], **more}).encode()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            request([{"type": "image_url", "image_url": "https://example.org/cat.jpg"}]),
            r"messages\.0\.content\.0\.image_url: an object with 'url' is expected",
        ),
        (
            request([{"type": "input_image", "image_url": "https://example.org/cat.jpg"}]),
            r"messages\.0\.content\.0: the type 'input_image' is not supported; known: image_url, text",
        ),
        (request([{"type": "image_url", "image_url": {"uri": "x"}}]), r"content\.0\.image_url\.url: Field required"),
        (request(["hi"]), r"messages\.0\.content\.0: an object is expected"),
        (request([{"text": "hi"}]), r"messages\.0\.content\.0: a part of a message needs a 'type'"),
        (request("hi", stop=5), "stop: Input should be a valid string or a valid array"),
        (request("hi", stop=["a", 5]), r"stop\.1: Input should be a valid string"),
        (b'{"model": ', "the request: Invalid JSON"),
    ],
)
def test_a_wrong_part_of_a_request_is_named(body: bytes, message: str) -> None:
    with pytest.raises(MmpipeError, match=message):
        _parse(body)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"take": 0}, r"^here: take: Input should be greater than 0 \(found 0\)$"),
        ({"take": "x"}, r"^here: take: Input should be a valid integer, .* or a valid number, .* \(found 'x'\)$"),
        ({"annotations": ["a", 3]}, r"^here: annotations\.1: Input should be a valid string \(found 3\)$"),
    ],
)
def test_all_alternatives_of_a_setting_are_one_finding(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(MixtureSourceSpec, {"dataset": "d", "annotations": "a", **settings}, "here")
