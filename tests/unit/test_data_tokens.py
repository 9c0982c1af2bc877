from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_records import IMAGE_TOKENS, char_tokenizer, encoder, entry, in_tokens, mix, said
from data_records import data_set as write_data_set
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mmpipe.data import tokens as module
from mmpipe.data.labels import IGNORE, Encoded
from mmpipe.data.record_table import RecordTable, write_records
from mmpipe.data.records import PreferenceRecord, Record, Turn
from mmpipe.data.tokens import Packed, TokenTable, pack, tokenise, unpack
from mmpipe.errors import ArtifactError, DataError

IMAGE = 7


def record(number: int, question: str = "What?", answer: str = "That.", images: tuple[str, ...] = ()) -> Record:
    return Record(f"r{number}", "made", images, (Turn("user", question), Turn("assistant", answer)))


def written(tmp_path: Path, records: list[Record]) -> Path:
    write_records(tmp_path / "records.arrow", records)
    return tmp_path / "records.arrow"


TOKEN = st.one_of(
    st.just((IMAGE, False)), st.tuples(st.integers(8, 12), st.booleans()), st.tuples(st.integers(8, 12), st.booleans())
)


@given(st.lists(TOKEN, min_size=1), st.integers(1, 5))
def test_packing_loses_nothing(tokens: list[tuple[int, bool]], image_tokens: int) -> None:
    ids, labels = [], []
    for token, learn in tokens:
        times = image_tokens if token == IMAGE else 1
        ids += [token] * times
        labels += [token if learn else IGNORE] * times
    packed = pack(Encoded(ids, labels), IMAGE, image_tokens)
    assert packed.ids == [token for token, _ in tokens]
    assert unpack(packed, IMAGE, image_tokens) == Encoded(ids, labels)


def test_two_answers_are_two_ranges() -> None:
    assert pack(Encoded([8, 9, 8, 9], [IGNORE, 9, IGNORE, 9]), IMAGE, 1) == Packed([8, 9, 8, 9], [1, 2, 3, 4])


def test_a_record_comes_back_as_it_was_encoded(tmp_path: Path) -> None:
    mix(
        write_data_set(tmp_path / "made", [entry(0, "0.png"), entry(1), entry(2, ["1.png", "2.png"])]), tmp_path / "out"
    )
    records = RecordTable(tmp_path / "out/records.arrow")
    table = in_tokens(tmp_path / "out/records.arrow")
    assert [row.conversations for row in table] == [(encoder()(one),) for one in records]  # type: ignore[arg-type]
    assert [row.images for row in table] == [one.images for one in records]
    assert [(row.place, row.id) for row in table] == [(0, "made/r0"), (1, "made/r1"), (2, "made/r2")]
    assert table.has_image == [True, False, True]
    assert table.words[:2] == [6 + 1 + 128, 6]


def test_what_cannot_be_trained_on_is_dropped_counted_and_named(tmp_path: Path) -> None:
    long = record(1, "x" * 400 + "<image>", images=("a.png",))
    records = written(tmp_path, [record(0), long, record(2, answer="y" * 400), record(3, "x" * 400), record(4)])
    table = in_tokens(records, encoder(max_length=300))
    assert [row.place for row in table] == [0, 2, 4]
    assert table.report["dropped"] == {
        "question too long": {"count": 1, "examples": [table.report["dropped"]["question too long"]["examples"][0]]},
        "too long for its images": {
            "count": 1,
            "examples": [table.report["dropped"]["too long for its images"]["examples"][0]],
        },
    }
    assert table.report["dropped"]["too long for its images"]["examples"][0].startswith("made/r1: cut to 300")
    assert (table.report["records"], table.report["kept"], table.report["cut"]) == (5, 3, 1)
    assert table.report["tokens_up_to"] == {"256": 2, "512": 1}


def test_what_is_supervised_is_counted(tmp_path: Path) -> None:
    mix(write_data_set(tmp_path / "made", [entry(0, "0.png"), entry(1)]), tmp_path / "out")
    table = in_tokens(tmp_path / "out/records.arrow")
    rows = [row.conversations[0] for row in table]
    assert table.report["supervised_tokens"] == sum(row.supervised for row in rows)
    assert table.report["image_tokens"] == IMAGE_TOKENS
    assert table.report["text_tokens"] == sum(len(row.input_ids) for row in rows) - IMAGE_TOKENS


def test_both_answers_of_a_preference_are_kept(tmp_path: Path) -> None:
    pair = PreferenceRecord("p", "made", (), (Turn("user", "What?"),), "a cat", "a")
    write_records(tmp_path / "records.arrow", [pair])
    table = in_tokens(tmp_path / "records.arrow")
    assert table.preferences
    learnt = [
        char_tokenizer().decode([token for token in one.labels if token != IGNORE]) for one in table[0].conversations
    ]
    assert learnt == [" a cat</s>", " a</s>"]


def test_shards_do_not_depend_on_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_SHARD", 3)
    records = written(tmp_path, [record(i, "ü" * i + "?") for i in range(8)])
    shards = {}
    for workers in (1, 2):
        out = tmp_path / str(workers)
        tokenise(records, encoder(), out, max_bad=0, workers=workers)
        shards[workers] = {path.name: path.read_bytes() for path in sorted((out / "shards").iterdir())}
        assert [row.id for row in TokenTable(out)] == [f"made/r{i}" for i in range(8)]
    assert list(shards[1]) == ["00000-of-00003.arrow", "00001-of-00003.arrow", "00002-of-00003.arrow"]
    assert shards[1] == shards[2]


def test_too_many_bad_records_stop_it(tmp_path: Path) -> None:
    records = written(tmp_path, [*(record(i) for i in range(9)), record(9, "no mark", images=("0.png",))])
    assert tokenise(records, encoder(), tmp_path / "out", max_bad=0.1)["kept"] == 9
    with pytest.raises(DataError, match=r"1 of 10 .*9\.0%.*\n.*made/r9"):
        tokenise(records, encoder(), tmp_path / "out", max_bad=0.09)


def test_a_template_of_another_model_is_refused(tmp_path: Path) -> None:
    description = json.loads(char_tokenizer().backend_tokenizer.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] != "</s>"]
    foreign = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)), unk_token="<unk>", name_or_path="foreign"
    )
    with pytest.raises(DataError, match=r"'vicuna_v1' ends answers with '</s>'.*foreign"):
        in_tokens(written(tmp_path, [record(0)]), encoder(tokenizer=foreign))


def test_captions_may_be_all_there_is(tmp_path: Path) -> None:
    mix(
        write_data_set(tmp_path / "made", [entry(0, "0.png", conversations=said("<image>", "A cat."))]),
        tmp_path / "out",
    )
    with_captions = encoder("plain", tokenizer=char_tokenizer(bos=False))
    table = in_tokens(tmp_path / "out/records.arrow", with_captions)
    assert table.require(with_captions.tokenizer, IMAGE_TOKENS) == 1


def test_nothing_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no records"):
        in_tokens(written(tmp_path, []))


def test_a_model_with_another_tokenizer_or_image_size_is_refused(tmp_path: Path) -> None:
    table = in_tokens(written(tmp_path, [record(0)]))
    share = table.require(char_tokenizer(), IMAGE_TOKENS)
    assert 0 < share < 1
    for tokenizer, size in ((char_tokenizer(), IMAGE_TOKENS + 1), (_grown(), IMAGE_TOKENS)):
        with pytest.raises(ArtifactError, match="another tokenizer or number of tokens an image"):
            table.require(tokenizer, size)
    with pytest.raises(DataError, match=r"of the text tokens are supervised, expected at least 99"):
        table.require(char_tokenizer(), IMAGE_TOKENS, minimum=0.99)


def _grown() -> PreTrainedTokenizerFast:
    grown = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(char_tokenizer().backend_tokenizer.to_str()), unk_token="<unk>"
    )
    grown.add_tokens(["new"])
    return grown


def test_a_shard_gone_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_SHARD", 1)
    table = in_tokens(written(tmp_path, [record(0), record(1)]))
    next((table.directory / "shards").iterdir()).unlink()
    with pytest.raises(ArtifactError, match=r"1 records, but its report.json counts 2"):
        TokenTable(table.directory)
    with pytest.raises(ArtifactError, match="no records in tokens"):
        TokenTable(tmp_path / "absent")


def test_records_on_disk(tmp_path: Path) -> None:
    (tmp_path / "records.arrow").write_bytes(b"nothing")
    for name in ("records.arrow", "absent.arrow"):
        with pytest.raises(ArtifactError, match=name):
            RecordTable(tmp_path / name)
    records = [record(i, "ü" * i + "?") for i in range(2500)]
    for name in ("a", "b"):
        assert write_records(tmp_path / name, iter(records)) == 2500
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert list(RecordTable(tmp_path / "a")) == records


def test_records_without_images_can_be_left_out(tmp_path: Path) -> None:
    mix(write_data_set(tmp_path / "made", [entry(0), entry(1, "0.png"), entry(2), entry(3, "1.png")]), tmp_path / "out")
    table = in_tokens(tmp_path / "out/records.arrow")
    chosen = table.with_images()
    assert ([row.place for row in chosen], chosen.has_image) == ([1, 3], [True, True])
    assert len(table) == 4
    with pytest.raises(DataError, match="no record has an image"):
        in_tokens(written(tmp_path, [record(0)])).with_images()
