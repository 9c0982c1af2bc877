from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_records import Entry, data_set, entry, image, mix, said
from PIL import Image
from pydantic import ValidationError

from mmpipe.data.mixture import build_mixture
from mmpipe.data.record_table import RecordTable
from mmpipe.data.records import PreferenceRecord, Record, length_in_words
from mmpipe.data.spec import MixtureSourceSpec, MixtureSpec
from mmpipe.data.verify import images_first
from mmpipe.errors import ConfigError, DataError


def kept(out: Path) -> list[Any]:
    return list(RecordTable(out / "records.arrow"))


def good(count: int) -> list[Entry]:
    """Every third record has no image."""
    return [entry(i, f"{i % 4}.png" if i % 3 else None) for i in range(count)]


def test_writes_records_report_and_lengths(tmp_path: Path) -> None:
    report = mix(data_set(tmp_path / "made", good(9)), tmp_path / "out")
    table = RecordTable(tmp_path / "out" / "records.arrow")
    assert [record.id for record in table] == [f"r{i}" for i in range(9)]
    record = table[1]
    assert isinstance(record, Record)
    assert record.source == "made"
    assert [turn.role for turn in record.turns] == ["user", "assistant"]
    assert Path(record.images[0]).is_file()
    assert [bool(record.images) for record in table] == [bool(i % 3) for i in range(9)]
    # "What is 0?" and "It is 0." are six words; an image adds its mark and 128.
    assert [length_in_words(record) for record in table][:2] == [6, 6 + 1 + 128]
    assert (report["kept"], report["wanted"], report["with_images"]) == (9, 9, 6)
    assert report["words_up_to"] == {"8": 3, "256": 6}
    assert report["longer_side_up_to"] == {"64": 6}
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    data = data_set(tmp_path / "made", good(40))
    written = []
    for workers in (1, 3):
        mix(data, tmp_path / str(workers), workers=workers)
        written.append(
            [(tmp_path / str(workers) / name).read_bytes() for name in ("records.arrow", "images.arrow", "report.json")]
        )
    assert written[0] == written[1]


def test_image_paths_are_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data_set(Path("resources/made"), good(3))
    mix(Path("resources/made"), Path("out"))
    assert kept(Path("out"))[1].images == ("resources/made/img/1.png",)
    mix(tmp_path / "resources/made", Path("out"))
    assert kept(Path("out"))[1].images == ("resources/made/img/1.png",)


def test_takes_the_first_folder_that_has_the_image(tmp_path: Path) -> None:
    data = data_set(tmp_path / "made", [entry(0, "a.png"), entry(1, "b.png")], images=0)
    image(data / "one" / "a.png")
    image(data / "two" / "a.png")
    image(data / "two" / "b.png")
    mix(data, tmp_path / "out", images=["one", "two"])
    places = [Path(record.images[0]).relative_to(data).as_posix() for record in kept(tmp_path / "out")]
    assert places == ["one/a.png", "two/b.png"]


# What is wrong with one record among good ones, under which reason it is counted, and what is said of it.
BAD: dict[str, tuple[Entry, str, str]] = {
    "missing image": (entry(0, "nowhere.png"), "missing image", "there is no nowhere.png in"),
    "corrupt image": (entry(0, "corrupt.png"), "corrupt image", "corrupt.png: the image is damaged"),
    "text as image": (entry(0, "text.jpg"), "corrupt image", "text.jpg: the image is in no known"),
    "no conversations": ({"id": "r0"}, "no conversation", "the conversation is missing or empty"),
    "empty conversations": (entry(0, conversations=[]), "no conversation", "missing or empty"),
    "only an answer": (
        entry(0, conversations=[{"from": "gpt", "value": "yes"}]),
        "odd turn order",
        "turn 1 is spoken by the assistant, expected the user",
    ),
    "two questions": (
        entry(0, conversations=[*said("a", "b"), *said("c"), *said("d")]),
        "odd turn order",
        "turn 4 is spoken by the user, expected the assistant",
    ),
    "unanswered question": (entry(0, conversations=said("a", "b", "c")), "odd turn order", "is not answered"),
    "unknown role": (entry(0, conversations=[{"from": "cat", "value": "m"}]), "unknown role", "by 'cat'"),
    "empty answer": (entry(0, conversations=said("a", " \n")), "empty answer", "turn 2 of 2 has no text"),
    "empty question": (entry(0, conversations=said("", "b")), "empty question", "turn 1 of 2 has no text"),
    "no text": (entry(0, conversations=[{"from": "human"}]), "malformed turn", "no text under 'value'"),
    "mark without image": (
        entry(0, conversations=said("<image>\na", "b")),
        "image marks and images differ",
        "1 <image> marks for 0 images",
    ),
    "image without mark": (
        entry(0, conversations=said("a", "b"), image="0.png"),
        "image marks and images differ",
        "0 <image> marks for 1 images",
    ),
    "mark in an answer alone": (
        entry(0, conversations=said("a", "<image>"), image="0.png"),
        "image marks and images differ",
        "0 <image> marks for 1 images",
    ),
    "image is a number": (entry(0, image=7, conversations=said("a", "b")), "malformed images", "'image'"),
    "a video": (entry(0, video="a.mp4"), "video", "only images are supported"),
    "not an object": (["a"], "not a record", "expected an object with named values"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_dropped_counted_and_named(case: str, tmp_path: Path) -> None:
    bad, reason, message = BAD[case]
    data = data_set(tmp_path / "made", [entry(1, "1.png"), bad, entry(2)])
    whole = (data / "img/0.png").read_bytes()
    (data / "img/corrupt.png").write_bytes(whole[: len(whole) // 2])
    (data / "img/text.jpg").write_text("not found")
    lines: list[str] = []
    report = mix(data, tmp_path / "out", max_bad=0.5, log=lines.append)
    assert [record.id for record in kept(tmp_path / "out")] == ["r1", "r2"]
    (part,) = report["parts"]
    assert part["dropped"][reason]["count"] == 1
    assert message in part["dropped"][reason]["examples"][0]
    assert (report["dropped"], part["wanted"], part["kept"]) == (1, 3, 2)
    assert any(line.startswith("dropped made/") and message in line for line in lines)


def test_too_many_bad_records_fail_with_the_reasons(tmp_path: Path) -> None:
    entries = [*good(20), entry(20, "nowhere.png"), entry(21, conversations=said("a", ""))]
    data = data_set(tmp_path / "made", entries)
    with pytest.raises(DataError) as error:
        mix(data, tmp_path / "out", max_bad=0.05)
    message = str(error.value)
    assert re.search(r"made \(data\.json\).*\b2 of 22\b", message), "the source and its numbers"
    assert re.search(r"missing image.*\b1\b.*r20.*nowhere\.png", message), "the record and its file"
    assert re.search(r"empty answer.*\b1\b.*r21", message)
    assert "max_bad" in message
    assert mix(data, tmp_path / "out", max_bad=0.1)["kept"] == 20


def test_max_bad_counts_in_every_part(tmp_path: Path) -> None:
    """A large good part does not hide a small bad one."""
    data = data_set(tmp_path / "made", good(100))
    data_set(tmp_path / "small", [entry(0, "nowhere.png"), entry(1)])
    parts = [{"dataset": name, "annotations": "data.json", "images": "img"} for name in ("made", "small")]
    spec = MixtureSpec.model_validate({"parts": parts, "max_bad": 0.1})
    with pytest.raises(DataError, match=r"small \(data.json\): 1 of 2"):
        build_mixture(spec, {"made": data, "small": tmp_path / "small"}, tmp_path / "out")


def test_an_empty_array_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 of 0"):
        mix(data_set(tmp_path / "made", []), tmp_path / "out", max_bad=1)


@pytest.mark.parametrize(
    "name", ["../secret.png", "a/../../secret.png", "/etc/passwd", "\x00/etc/passwd", "\\\\host\\x.png"]
)
def test_an_image_name_that_leads_out_of_the_folder_is_an_error(name: str, tmp_path: Path) -> None:
    """Not one bad record among others: nobody writes this by accident."""
    data = data_set(tmp_path / "made", [entry(0, name)])
    image(tmp_path / "made" / "secret.png")
    with pytest.raises(DataError, match="leads out of the data set's folder"):
        mix(data, tmp_path / "out", max_bad=1)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda data: (data / "data.json").unlink(), "data.json: cannot be read"),
        (lambda data: (data / "img").rename(data / "other"), "img: the folder of images cannot be read"),
        (
            lambda data: (data / "data.json").write_bytes((data / "data.json").read_bytes()[:-40]),
            r"data.json, line 1, column \d+: not valid JSON",
        ),
        (lambda data: (data / "data.json").write_text(""), "the file is empty"),
        (lambda data: (data / "data.json").write_bytes(b'[{"id": "\xe9"}]'), "not UTF-8"),
    ],
    ids=["no annotations", "no folder", "truncated", "empty", "latin-1"],
)
def test_what_cannot_be_read_is_an_error(break_it: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    data = data_set(tmp_path / "made", good(5))
    break_it(data)
    with pytest.raises(DataError, match=message):
        mix(data, tmp_path / "out", max_bad=1)


def test_json_lines_are_accepted_where_an_array_is_expected(tmp_path: Path) -> None:
    data = data_set(tmp_path / "made", good(5))
    mix(data, tmp_path / "array")
    (data / "data.json").write_text("".join(json.dumps(one) + "\n" for one in good(5)))
    mix(data, tmp_path / "lines")
    assert kept(tmp_path / "lines") == kept(tmp_path / "array")


def test_a_gif_named_jpg_is_read_and_noted(tmp_path: Path) -> None:
    data = data_set(tmp_path / "made", [entry(0, "a.jpg")])
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(data / "img/a.jpg", format="GIF", save_all=True, append_images=frames[1:])
    report = mix(data, tmp_path / "out")
    notes = report["parts"][0]["notes"]
    assert notes["GIF named .jpg"]["count"] == 1
    assert notes["several frames, first taken"]["count"] == 1


def test_an_answer_may_contain_a_role_marker(tmp_path: Path) -> None:
    strange = entry(0, conversations=said("Say it.", "USER: x ASSISTANT: y</s>"))
    mix(data_set(tmp_path / "made", [strange]), tmp_path / "out")
    assert kept(tmp_path / "out")[0].turns[1].text == "USER: x ASSISTANT: y</s>"


def test_an_answer_before_the_first_question_is_left_out_and_noted(tmp_path: Path) -> None:
    greeting = {"from": "gpt", "value": "hello"}
    data = data_set(tmp_path / "made", [entry(0, conversations=[greeting, *said("a", "b")])])
    report = mix(data, tmp_path / "out")
    assert [turn.text for turn in kept(tmp_path / "out")[0].turns] == ["a", "b"]
    assert report["parts"][0]["notes"]["answer before the first question left out"]["count"] == 1


def test_equal_ids_are_numbered_and_nothing_is_lost(tmp_path: Path) -> None:
    entries = [entry(0), entry(0), entry(0, conversations=said("other", "b")), entry(0, id="r0#2")]
    report = mix(data_set(tmp_path / "made", entries), tmp_path / "out")
    assert [record.id for record in kept(tmp_path / "out")] == ["r0", "r0#2", "r0#3", "r0#2#2"]
    notes = report["parts"][0]["notes"]
    assert notes["id used before, numbered"]["count"] == 1
    assert notes["record seen before, kept again"]["count"] == 2


def test_a_record_without_id_is_called_after_its_place(tmp_path: Path) -> None:
    first, second = entry(0), entry(1, id=17)
    del first["id"]
    mix(data_set(tmp_path / "made", [first, second]), tmp_path / "out")
    assert [record.id for record in kept(tmp_path / "out")] == ["data-0", "17"]


@pytest.mark.parametrize(("take", "expected"), [(5, 5), (0.25, 10), (1.0, 40), (1, 1), (None, 40)])
def test_take_chooses_so_many_records(take: float | None, expected: int, tmp_path: Path) -> None:
    data = data_set(tmp_path / "made", good(40))
    report = mix(data, tmp_path / "out", take=take)
    ids = [record.id for record in kept(tmp_path / "out")]
    assert len(ids) == expected == report["kept"]
    assert ids == sorted(ids, key=lambda name: int(name[1:]))
    assert report["parts"][0]["found"] == 40


def test_take_depends_on_the_seed_alone(tmp_path: Path) -> None:
    data = data_set(tmp_path / "made", good(40))
    chosen = {}
    for seed in (0, 1):
        for extra in ([], [{"dataset": "made", "annotations": "data.json", "images": "img"}]):
            part = {"dataset": "made", "annotations": "data.json", "images": "img", "take": 6}
            spec = MixtureSpec.model_validate({"parts": [part, *extra], "seed": seed})
            build_mixture(spec, {"made": data}, tmp_path / "out")
            chosen[seed, len(extra)] = [record.id for record in kept(tmp_path / "out")[:6]]
    assert chosen[0, 0] == chosen[0, 1] != chosen[1, 0] == chosen[1, 1]


def test_take_more_than_there_are_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`take: 50` but there are only 9 such records"):
        mix(data_set(tmp_path / "made", good(9)), tmp_path / "out", take=50)


@pytest.mark.parametrize(("with_images", "expected"), [(True, 6), (False, 3), (None, 9)])
def test_with_images_filters(with_images: bool | None, expected: int, tmp_path: Path) -> None:
    report = mix(data_set(tmp_path / "made", good(9)), tmp_path / "out", with_images=with_images)
    assert (report["kept"], report["parts"][0]["found"]) == (expected, expected)


def test_suffix_and_image_position_change_every_question(tmp_path: Path) -> None:
    talk = said("What?\n<image>", "a", "And?", "b")
    data = data_set(tmp_path / "made", [entry(0, conversations=talk, image="0.png")])
    mix(data, tmp_path / "out", suffix="\nBe brief.", image_position="first")
    texts = [turn.text for turn in kept(tmp_path / "out")[0].turns]
    assert texts == ["<image>\nWhat?\nBe brief.", "a", "And?\nBe brief.", "b"]


def test_images_first_keeps_every_image() -> None:
    assert images_first("a <image> b <image>") == "<image><image>\na  b"
    assert images_first("<image>") == "<image>"
    assert images_first("none") == "none"


def test_preferences_are_verified_and_kept(tmp_path: Path) -> None:
    def pair(number: int, chosen: str, rejected: str, question: str = "<image>\nWhat?") -> Entry:
        return {
            "id": f"p{number}",
            "image": "0.png",
            "chosen": said("<image>\nWhat?", chosen),
            "rejected": said(question, rejected),
        }

    entries = [pair(0, "a cat", "a dog on a very long leash"), pair(1, "same", "same"), pair(2, "a", "")]
    entries += [pair(3, "a", "b", question="<image>\nWho?")]
    report = mix(data_set(tmp_path / "made", entries), tmp_path / "out", format="preference", max_bad=0.8)
    (record,) = kept(tmp_path / "out")
    assert isinstance(record, PreferenceRecord)
    assert (record.chosen, record.rejected) == ("a cat", "a dog on a very long leash")
    assert [turn.text for turn in record.prompt] == ["<image>\nWhat?"]
    assert length_in_words(record) == 2 + 7 + 128
    assert {reason: facts["count"] for reason, facts in report["parts"][0]["dropped"].items()} == {
        "different questions": 1,
        "empty answer": 1,
        "equal answers": 1,
    }


def pixels(path: Path, seed: int) -> bytes:
    return image(path / f"{seed}.png", seed=seed).read_bytes()


def test_images_inside_parquet_are_written_out_once(tmp_path: Path) -> None:
    first, second = pixels(tmp_path, 1), pixels(tmp_path, 2)
    rows = [
        {"question": "What?", "chosen": "a", "rejected": "b", "image": {"bytes": first, "path": "x.jpg"}},
        {"question": "Who?", "chosen": "a", "rejected": "b", "image": {"bytes": first, "path": None}},
        {"question": "Why?", "chosen": "a", "rejected": "b", "image": {"bytes": second, "path": None}},
        {"question": "Bad?", "chosen": "a", "rejected": "b", "image": {"bytes": b"GIF89a", "path": None}},
        {"question": "None?", "chosen": "a", "rejected": "b", "image": None},
        {"question": " ", "chosen": "a", "rejected": "b", "image": {"bytes": first, "path": None}},
        {"question": "Same?", "chosen": "a", "rejected": None, "image": {"bytes": first, "path": None}},
    ]
    data = data_set(tmp_path / "made", [], images=0)
    for shard in (rows[:3], rows[3:]):
        pq.write_table(pa.Table.from_pylist(shard), data / f"RLAIF_{len(shard)}.parquet")
    settings = {"format": "rlaif_v", "annotations": "RLAIF_*.parquet", "images": ".", "max_bad": 0.9}
    report = mix(data, tmp_path / "stage", published=tmp_path / "final", **settings)
    records = kept(tmp_path / "stage")
    assert [record.id for record in records] == ["RLAIF_3-0", "RLAIF_3-1", "RLAIF_3-2"]
    assert [turn.text for turn in records[0].prompt] == ["<image>\nWhat?"]
    files = [Path(record.images[0]) for record in records]
    assert files[0] == files[1] != files[2]
    assert all(file.is_relative_to(tmp_path / "final/images") for file in files)
    (tmp_path / "stage").rename(tmp_path / "final")
    assert [file.read_bytes() for file in files] == [first, first, second]
    assert {reason: facts["count"] for reason, facts in report["parts"][0]["dropped"].items()} == {
        "corrupt image": 1,
        "empty question": 1,
        "image marks and images differ": 1,
        "malformed turn": 1,
    }


def test_a_damaged_image_in_parquet_drops_its_record_alone(tmp_path: Path) -> None:
    whole = pixels(tmp_path, 1)
    cut = [whole[:20], whole[:60], b"\x89PNG", b"x"]
    rows = [
        {"question": "What?", "chosen": "a", "rejected": "b", "image": {"bytes": content, "path": "x.jpg"}}
        for content in (whole, *cut, whole)
    ]
    data = data_set(tmp_path / "made", [], images=0)
    pq.write_table(pa.Table.from_pylist(rows), data / "a.parquet")
    settings = {"format": "rlaif_v", "annotations": "a.parquet", "images": ".", "max_bad": 0.9}
    report = mix(data, tmp_path / "out", **settings)
    assert [record.id for record in kept(tmp_path / "out")] == ["a-0", "a-5"]
    assert {reason: facts["count"] for reason, facts in report["parts"][0]["dropped"].items()} == {"corrupt image": 4}


def as_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


# An image in the forms of other programs; all but the last are one file of the data set or its content.
FORMS: dict[str, Callable[[bytes], Any]] = {
    "bytes": lambda content: content,
    "bytes in an object": lambda content: {"bytes": content},
    "empty bytes beside a path": lambda content: {"bytes": b"", "path": "0.png"},
    "no bytes beside a path": lambda content: {"bytes": None, "path": "0.png"},
    "a list of bytes": lambda content: [content],
    "base64": as_base64,
    "base64 in an object": lambda content: {"bytes": as_base64(content), "path": None},
    "a data address": lambda content: f"data:image/png;base64,{as_base64(content)}",
    "a file address": lambda content: "file://0.png",
    "openai": lambda content: {"url": f"data:image/png;base64,{as_base64(content)}"},
    "qwen": lambda content: {"type": "image", "image": "0.png"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", ["image", "images", "image_url"])
def test_an_image_is_read_in_every_form(form: str, key: str, tmp_path: Path) -> None:
    data = data_set(tmp_path / "made", [])
    content = (data / "img/0.png").read_bytes()
    row = {"id": "a", "conversations": said("<image>\na", "b"), key: FORMS[form](content)}
    pq.write_table(pa.Table.from_pylist([row]), data / "a.parquet")
    report = mix(data, tmp_path / "out", annotations="a.parquet")
    assert report["kept"] == 1
    assert Path(kept(tmp_path / "out")[0].images[0]).read_bytes() == content


@pytest.mark.parametrize(
    "part",
    [
        lambda content: {"type": "image", "image": "0.png"},
        lambda content: {"type": "image", "path": "0.png"},
        lambda content: {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{as_base64(content)}"}},
    ],
)
def test_images_in_the_parts_of_messages_are_read(part: Callable[[bytes], Entry], tmp_path: Path) -> None:
    data = data_set(tmp_path / "made", [])
    content = (data / "img/0.png").read_bytes()
    question = {"role": "user", "content": [{"type": "text", "text": "What?"}, part(content)]}
    rows = [{"messages": [question, {"role": "assistant", "content": "That."}]}]
    (data / "data.json").write_text(json.dumps(rows))
    assert mix(data, tmp_path / "out", format="messages")["kept"] == 1
    (record,) = kept(tmp_path / "out")
    assert record.turns[0].text == "What?<image>"
    assert Path(record.images[0]).read_bytes() == content


def test_files_and_contents_may_be_mixed_in_one_record(tmp_path: Path) -> None:
    data = data_set(tmp_path / "made", [])
    images = [{"bytes": None, "path": "1.png"}, {"bytes": pixels(tmp_path, 9), "path": None}]
    row = {"id": "a", "conversations": said("<image><image>\na", "b"), "images": images}
    pq.write_table(pa.Table.from_pylist([row]), data / "a.parquet")
    assert mix(data, tmp_path / "out", annotations="a.parquet")["kept"] == 1
    first, second = kept(tmp_path / "out")[0].images
    assert (Path(first).name, Path(second).read_bytes()) == ("1.png", pixels(tmp_path, 9))


@pytest.mark.parametrize(
    ("image", "reason", "message"),
    [
        ({"bytes": b"", "path": ""}, "malformed images", "without content and without a file name"),
        ({"url": "https://example.org/cat.jpg"}, "image at a web address", "download the images"),
        ("data:image/png;base64,%%%%", "corrupt image", "is damaged"),
        ("data:image/png,abc", "corrupt image", "only data:image"),
        (7, "malformed images", "'image' holds int where an image is expected"),
    ],
)
def test_an_image_that_cannot_be_read_has_a_reason_that_helps(
    image: Any, reason: str, message: str, tmp_path: Path
) -> None:
    data = data_set(tmp_path / "made", [])
    row = {"id": "a", "conversations": said("<image>\na", "b"), "image": image}
    pq.write_table(pa.Table.from_pylist([row]), data / "a.parquet")
    with pytest.raises(DataError, match=f"{reason}.*{message}"):
        mix(data, tmp_path / "out", annotations="a.parquet")


def test_transparent_images_are_counted(tmp_path: Path) -> None:
    data = data_set(tmp_path / "made", [entry(0, "0.png"), entry(1, "1.png")])
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(data / "img/1.png")
    assert mix(data, tmp_path / "out")["parts"][0]["notes"]["transparent pixels put on white"]["count"] == 1


def test_messages_with_parts_are_read(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
            ],
            "images": ["0.png"],
        },
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        {"text": "x"},
    ]
    data = data_set(tmp_path / "made", [])
    (data / "data.json").write_text("\n".join(map(json.dumps, rows)))
    report = mix(data, tmp_path / "out", format="messages", max_bad=0.5)
    first, second = kept(tmp_path / "out")
    assert [turn.text for turn in first.turns] == ["Be brief.", "<image>What?", "That."]
    assert [turn.text for turn in second.turns] == ["a", "b"]
    assert set(report["parts"][0]["dropped"]) == {"malformed turn", "no conversation"}


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    data = data_set(tmp_path / "made", [])
    (data / "data.json").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        mix(data, tmp_path / "out", format="messages")


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file matches `annotations: "):
        mix(data_set(tmp_path / "made", good(1)), tmp_path / "out", annotations="*.parquet")


def test_an_unknown_format_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'llava'"):
        mix(data_set(tmp_path / "made", good(1)), tmp_path / "out", format="lava")


@pytest.mark.parametrize("change", [{"annotations": "../x"}, {"images": "/x"}, {"take": 0}, {"take": 1.5}, {"tke": 1}])
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MixtureSourceSpec.model_validate({"dataset": "made", "annotations": "data.json"} | change)


HALF = "b \ud83d"
"""The first half of a smiley, as ``"b \\ud83d"`` in a JSON file cut by characters gives it."""


@pytest.mark.parametrize(
    "change",
    [
        {"conversations": said("a", HALF)},
        {"conversations": said(HALF, "b")},
        {"image": f"{HALF}.png", "conversations": said("<image>a", "b")},
        {"id": HALF},
        {"conversations": [{"from": HALF, "value": "x"}]},
        {"system": HALF},
    ],
    ids=["answer", "question", "image", "id", "role", "system"],
)
def test_half_a_character_is_one_bad_record(change: Entry, tmp_path: Path) -> None:
    data = data_set(tmp_path / "made", [entry(1), entry(0, **change), entry(2)])
    report = mix(data, tmp_path / "out", max_bad=0.5)
    assert [record.id for record in kept(tmp_path / "out")] == ["r1", "r2"]
    (reason,) = report["parts"][0]["dropped"]
    assert reason in ("text that is not Unicode", "unknown role")


def test_a_name_too_long_for_any_file_is_a_missing_image(tmp_path: Path) -> None:
    entries = [entry(0, "a" * 300 + ".png"), entry(1, "b/" * 3000 + "c.png"), entry(2, "1.png")]
    report = mix(data_set(tmp_path / "made", entries), tmp_path / "out", max_bad=0.7)
    dropped = report["parts"][0]["dropped"]["missing image"]
    assert dropped["count"] == 2
    assert all(len(example) < 400 for example in dropped["examples"])


@pytest.mark.parametrize("format_name", ["llava", "messages", "preference"])
def test_a_system_message_beside_the_conversation_is_a_turn(format_name: str, tmp_path: Path) -> None:
    row = {
        "llava": {"conversations": said("a", "b")},
        "messages": {"messages": said("a", "b")},
        "preference": {"chosen": said("a", "b"), "rejected": said("a", "c")},
    }[format_name]
    rows = [
        row | {"system": "Be brief."},
        row | {"system": ""},
        row | {"system": 7},
        {name: [{"from": "system", "value": "x"}, *turns] for name, turns in row.items()} | {"system": "y"},
    ]
    report = mix(data_set(tmp_path / "made", rows), tmp_path / "out", format=format_name, max_bad=0.5)
    first, second = (record.conversations[0].turns for record in kept(tmp_path / "out"))
    assert [turn.role for turn in first] == ["system", "user", "assistant"]
    assert first[0].text == "Be brief."
    assert [turn.role for turn in second] == ["user", "assistant"]
    assert set(report["parts"][0]["dropped"]) == {"malformed turn", "two system messages"}


def test_sharegpt_names_images_in_the_plural(tmp_path: Path) -> None:
    two = entry(0, ["0.png", "1.png"])
    two["images"] = two.pop("image")
    entries = [two, entry(1, "2.png", images=[]), entry(2, "2.png", images=["1.png"])]
    report = mix(data_set(tmp_path / "made", entries), tmp_path / "out", max_bad=0.5)
    assert [len(record.images) for record in kept(tmp_path / "out")] == [2, 1]
    assert set(report["parts"][0]["dropped"]) == {"malformed images"}


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


PAIRS: dict[str, Entry] = {
    "LLaVA-MoD": {"image": "0.png", "chosen": said("<image>\nQ", "a"), "rejected": said("<image>\nQ", "b")},
    "LLaMA-Factory": {
        "images": ["0.png"],
        "conversations": said("<image>\nQ"),
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "TRL": {
        "images": ["0.png"],
        "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "\nQ"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
        "rejected": [{"role": "assistant", "content": "b"}],
    },
    "TRL, without marks": {
        "images": ["0.png"],
        "prompt": chat("Q"),
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    },
    "TRL, with the prompt inside": {"images": ["0.png"], "chosen": chat("Q", "a"), "rejected": chat("Q", "b")},
    "TRL, texts": {"images": ["0.png"], "prompt": "Q", "chosen": "a", "rejected": "b"},
}


@pytest.mark.parametrize("way", PAIRS)
def test_preferences_are_read_however_they_are_written(way: str, tmp_path: Path) -> None:
    mix(data_set(tmp_path / "made", [PAIRS[way]]), tmp_path / "out", format="preference")
    (record,) = kept(tmp_path / "out")
    assert [(turn.role, turn.text) for turn in record.prompt] == [("user", "<image>\nQ")]
    assert (record.chosen, record.rejected) == ("a", "b")
    assert len(record.images) == 1


def test_messages_without_marks_have_their_images_first_and_a_note(tmp_path: Path) -> None:
    rows = [{"messages": chat("Q", "a", "R", "b"), "images": ["0.png", "1.png"]}]
    report = mix(data_set(tmp_path / "made", rows), tmp_path / "out", format="messages")
    texts = [turn.text for turn in kept(tmp_path / "out")[0].turns]
    assert texts == ["<image><image>\nQ", "a", "R", "b"]
    assert report["parts"][0]["notes"]["images put before the first question"]["count"] == 1


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ({"only": "a/*"}, ["r0", "r1"]),
        ({"without": ["a/1.png", "b/*"]}, ["r0", "r3"]),
        ({"only": ["a/*", "b/*"], "without": "*/0.png"}, ["r1"]),
        ({"without": "*", "take": 1}, ["r3"]),
        ({"with_images": True, "without": "a/*"}, ["r2"]),
    ],
)
def test_records_are_left_out_by_the_names_of_their_images(
    filters: dict[str, Any], ids: list[str], tmp_path: Path
) -> None:
    entries = [entry(0, "a/0.png"), entry(1, "a/1.png"), entry(2, ["a/1.png", "b/0.png"]), entry(3)]
    data = data_set(tmp_path / "made", entries)
    for name in ("a/0.png", "a/1.png", "b/0.png"):
        image(data / "img" / name)
    if filters == {"with_images": True, "without": "a/*"}:
        (data / "data.json").write_text(json.dumps([*entries[:2], entry(2, "b/0.png"), entry(3)]))
    report = mix(data, tmp_path / "out", **filters)
    assert [record.id for record in kept(tmp_path / "out")] == ids
    (part,) = report["parts"]
    assert (part["found"], part["left_out"]) == (len(ids), 4 - len(ids))


def test_a_prefix_stands_between_images_and_question(tmp_path: Path) -> None:
    talk = said("<image>\n<image>\nWhat?", "a", "And <here>?", "b")
    data = data_set(tmp_path / "made", [entry(0, ["0.png", "1.png"], conversations=talk)])
    mix(data, tmp_path / "out", prefix="Look. ", suffix=" Be brief.")
    texts = [turn.text for turn in kept(tmp_path / "out")[0].turns]
    assert texts == ["<image>\n<image>\nLook. What? Be brief.", "a", "Look. And <here>? Be brief.", "b"]


def test_a_failure_leaves_its_report_with_known_reasons(tmp_path: Path) -> None:
    names = ["ocr/0.png", "ocr/1.png", "coco/0.png", "coco/1.png", "2.png"]
    data = data_set(tmp_path / "made", [entry(i, name) for i, name in enumerate(names)])
    for name in ("ocr/0.png", "coco/0.png", "coco/1.png"):
        image(data / "img" / name)
    part = {"dataset": "made", "annotations": "data.json", "images": "img", "known": "covers vanish"}
    failed = tmp_path / "logs/mix/small.report.json"
    reports = []
    for max_bad in (0.1, 0.5):
        spec = MixtureSpec.model_validate({"parts": [part], "max_bad": max_bad})
        if max_bad < 0.2:
            with pytest.raises(DataError) as error:
                build_mixture(spec, {"made": data}, tmp_path / "out", failed_report=failed)
            reports.append(json.loads(failed.read_text()))
        else:
            reports.append(build_mixture(spec, {"made": data}, tmp_path / "out", failed_report=failed))
    assert f"{failed} counts all of them" in str(error.value)
    assert "in ocr: 1 of 2 records lack an image" in str(error.value)
    assert "known: covers vanish" in str(error.value)
    assert reports[0] == reports[1] | {"max_bad": 0.1}
    assert reports[1]["parts"][0]["without_image_by_folder"] == {"ocr": {"records": 2, "dropped": 1}}
    assert not failed.exists()


def test_the_report_page_shows_drops_by_folder_and_what_is_known(tmp_path: Path) -> None:
    from mmpipe.report.pages import table_page

    data = data_set(tmp_path / "made", [entry(0, "ocr/0.png"), entry(1)])
    mix(data, tmp_path / "out", max_bad=0.5, known="covers <vanish>")
    table_page("mixture", tmp_path / "out/report.json", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Known: covers &lt;vanish&gt;" in page
    assert "<code>ocr</code>" in page


def test_equal_images_and_records_are_counted_over_data_sets(tmp_path: Path) -> None:
    first = data_set(tmp_path / "first", [entry(0, "0.png"), entry(1, "1.png"), entry(2, "1.png")])
    second = data_set(tmp_path / "second", [entry(7, "0.png", id="x"), entry(1, "1.png"), entry(9)])
    (second / "img/0.png").write_bytes((first / "img/0.png").read_bytes())
    (second / "img/1.png").write_bytes((first / "img/1.png").read_bytes())
    parts = [{"dataset": name, "annotations": "data.json", "images": "img"} for name in ("first", "second")]
    spec = MixtureSpec.model_validate({"parts": parts})
    report = build_mixture(spec, {"first": first, "second": second}, tmp_path / "out")
    assert report["equal_images"] == 2
    assert report["parts"][0]["notes"] == {}
    assert {note: facts["count"] for note, facts in report["parts"][1]["notes"].items()} == {
        "image equal to one of another name": 2,
        "record of another data set, kept again": 1,
    }


def test_an_id_may_come_back_for_ever(tmp_path: Path) -> None:
    """Counting up from two every time would take the square of their number."""
    entries = [entry(i, id="x") for i in range(3000)]
    mix(data_set(tmp_path / "made", entries), tmp_path / "out", log=lambda line: None)
    ids = [record.id for record in kept(tmp_path / "out")]
    assert ids == ["x", *(f"x#{number}" for number in range(2, 3001))]


def test_images_that_were_forgotten_are_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmpipe.data import image_files
    from mmpipe.data import verify as module

    data = data_set(tmp_path / "made", [entry(i, f"{i % 4}.png") for i in range(40)])
    mix(data, tmp_path / "much")
    monkeypatch.setattr(image_files, "REMEMBERED", 1)
    monkeypatch.setattr(module, "_BLOCK", 3)
    mix(data, tmp_path / "little")
    for name in ("records.arrow", "images.arrow", "report.json"):
        assert (tmp_path / "much" / name).read_bytes() == (tmp_path / "little" / name).read_bytes()
