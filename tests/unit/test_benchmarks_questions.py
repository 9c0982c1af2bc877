"""Every benchmark reads its official files: a small copy of each layout is prepared and scored."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_layouts import FORMS, LAYOUTS, VERDICTS, lines, mmbench, parquet, pope, text64, vqav2_llava

from mmpipe.benchmarks.base import Question, get, names
from mmpipe.benchmarks.jsonl import read_document
from mmpipe.benchmarks.prepare import prepare, read_questions
from mmpipe.benchmarks.scoring import convert_files, score_files
from mmpipe.benchmarks.spec import BenchmarkEntry
from mmpipe.errors import DataError


def entry(name: str, **settings: Any) -> BenchmarkEntry:
    return BenchmarkEntry(task=name, data="data", **settings)


def test_every_benchmark_has_a_layout_here():
    assert sorted(LAYOUTS) == names()


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_official_files_are_asked_and_scored(name, tmp_path):
    make, first = LAYOUTS[name]
    (tmp_path / "data").mkdir()
    right = make(tmp_path / "data")
    facts = prepare(entry(name), tmp_path / "data", tmp_path / "out")
    questions = read_questions(tmp_path / "out")
    assert questions[0].text == first
    assert facts["questions"] == len(questions) == len(right)
    assert all(path.is_file() for q in questions for path in q.images)
    assert {p.name for q in questions for p in q.images} == {p.name for p in (tmp_path / "out/images").iterdir()}
    for question in questions:
        assert question.text.count("<image>") in (0, len(question.images))

    scored_and_submitted(name, tmp_path, questions, right)


@pytest.mark.parametrize(("name", "form"), sorted(FORMS))
def test_other_forms_ask_the_same(name, form, tmp_path):
    make, files = FORMS[name, form]
    (tmp_path / "data").mkdir()
    right = make(tmp_path / "data")
    prepare(entry(name, files=files), tmp_path / "data", tmp_path / "out")
    questions = read_questions(tmp_path / "out")
    assert questions[0].text == LAYOUTS[name][1]
    assert len(questions) == len(right)
    scored_and_submitted(name, tmp_path, questions, right)


@pytest.mark.parametrize(("name", "form"), [pair for pair in sorted(FORMS) if pair[1] == "hub"])
def test_a_column_that_the_hub_lost_is_named(name, form, tmp_path):
    import pyarrow.parquet as pq

    make, files = FORMS[name, form]
    make(tmp_path)
    for path in tmp_path.rglob("*.parquet"):
        table = pq.read_table(path)
        if "question" in table.column_names:
            pq.write_table(table.drop_columns("question"), path)
    with pytest.raises(DataError, match=r"lacks question"):
        prepare(entry(name, files=files), tmp_path, tmp_path / "out")


def test_a_known_number_of_questions_is_proven(tmp_path):
    pope(tmp_path)
    prepare(entry("pope", questions=6), tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="6 questions where 'pope' has 8910"):
        prepare(entry("pope", questions=8910), tmp_path, tmp_path / "out")


def test_questions_of_another_split_are_named(tmp_path):
    FORMS["gqa", "llava"][0](tmp_path)
    path = tmp_path / "llava_gqa_testdev_balanced.jsonl"
    path.write_text(path.read_text().replace("201", "999"))
    with pytest.raises(DataError, match=r"1 questions have no reference, e\.g\. \['999'\]"):
        prepare(entry("gqa"), tmp_path, tmp_path / "out")


def test_a_vqav2_submission_holds_all_of_test2015(tmp_path):
    vqav2_llava(tmp_path)
    files = {
        "questions": "llava_vqav2_mscoco_test-dev2015.jsonl",
        "submitted": "llava_vqav2_mscoco_test2015.jsonl",
        "images": "test2015",
    }
    facts = prepare(entry("vqav2", files=files), tmp_path, tmp_path / "out")
    assert facts["questions"] == 1
    lines(tmp_path / "answers.jsonl", [{"question_id": 420, "text": "Yes."}])
    convert_files("vqav2", [tmp_path / "out/references.jsonl"], [tmp_path / "answers.jsonl"], tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text()) == [
        {"question_id": 419, "answer": ""},
        {"question_id": 420, "answer": "yes"},
        {"question_id": 421, "answer": ""},
    ]
    prepare(entry("vqav2", files=files, limit=1), tmp_path, tmp_path / "few")
    assert len((tmp_path / "few/references.jsonl").read_text().splitlines()) == 1


def scored_and_submitted(name: str, tmp_path: Path, questions: list[Question], right: list[str]) -> None:
    """Right answers score full marks and give a submission."""
    references, answers = tmp_path / "out/references.jsonl", tmp_path / "answers.jsonl"
    lines(
        answers,
        [
            {"question_id": q.id, "prompt": q.text if q.prompt is None else q.prompt, "text": text, **q.extra}
            for q, text in zip(questions, right, strict=True)
        ],
    )
    submission = tmp_path / f"submission.{get(name).submission}"
    assert convert_files(name, [references], [answers], submission)["missing"] == 0
    assert submission.stat().st_size > 0
    if name == "mmvet":
        with pytest.raises(DataError, match="online grader"):
            score_files(name, [references], [answers])
        return
    judge = tmp_path / "judge.jsonl"
    lines(judge, [{"question_id": q.id, "reply": VERDICTS.get(name)} for q in questions])
    result = score_files(name, [references], [answers], judge=judge if name in VERDICTS else None)
    assert result["missing"] == result["unparsed"] == 0
    per_item = score_files(
        name,
        [references],
        [answers],
        judge=judge if name in VERDICTS else None,
        per_item=tmp_path / "items.jsonl",
        out=tmp_path / "score.json",
    )
    assert read_document(tmp_path / "score.json").content == per_item
    items = read_document(tmp_path / "items.jsonl").content
    assert len(items) == result["n"]
    wrong = [item for item in items if not item["correct"]]
    assert len(wrong) == (1 if name == "objhal" else 0)  # a woman where only dogs and traffic lights are


@pytest.mark.parametrize("name", sorted(LAYOUTS))
@pytest.mark.parametrize("fault", ["empty folder", "wrong columns"])
def test_wrong_files_are_named(name, fault, tmp_path):
    (tmp_path / "data").mkdir()
    if fault == "wrong columns":
        LAYOUTS[name][0](tmp_path / "data")
        for path in sorted((tmp_path / "data").rglob("*")):
            if path.suffix in (".json", ".jsonl", ".tsv"):
                path.write_text("a\tb\n1\t2\n" if path.suffix == ".tsv" else '[{"a": 1}]')
            elif path.suffix == ".parquet":
                parquet(path, [{"a": 1}])
            elif path.suffix == ".txt":
                path.write_text("no tab here\n")
    with pytest.raises(DataError) as error:
        prepare(entry(name), tmp_path / "data", tmp_path / "out")
    assert len(str(error.value)) > 20


@pytest.mark.parametrize(("name", "where"), [("ai2d", "data"), ("mmmu", "."), ("mme", "MME_Benchmark_release_version")])
def test_folders_are_references_too(name, where, tmp_path):
    LAYOUTS[name][0](tmp_path)
    task = get(name)
    asked = task.references(task.source(tmp_path), task.protocol())
    assert task.read_references([tmp_path / where]) == asked
    (tmp_path / "none.jsonl").write_text("")
    assert score_files(name, [tmp_path / where], [tmp_path / "none.jsonl"])["missing"] == len(asked)


def test_every_protocol_of_every_benchmark_asks(tmp_path):
    for name, (make, _) in LAYOUTS.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name)
        task = get(name)
        for protocol in task.protocols:
            texts = [q.text for q in task.questions(task.source(tmp_path / name), protocol)]
            assert texts
            assert len(task.references(task.source(tmp_path / name), protocol)) == len(texts)


def test_images_may_not_lead_out_of_the_data_set(tmp_path):
    pope(tmp_path)
    for name in ("../../etc/passwd", "/etc/passwd"):
        record = {"question_id": 1, "image": name, "text": "?", "label": "yes"}
        lines(tmp_path / "coco/coco_pope_adversarial.json", [record, {**record, "question_id": 2}])
        with pytest.raises(DataError, match=r"outside|is not there"):
            prepare(entry("pope"), tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_adopted_folders_are_links(name, tmp_path):
    """A data set that is on disk already is linked, folder by folder."""
    (tmp_path / "disk").mkdir()
    right = LAYOUTS[name][0](tmp_path / "disk")
    (tmp_path / "data").mkdir()
    for path in (tmp_path / "disk").iterdir():
        (tmp_path / "data" / path.name).symlink_to(path)
    assert prepare(entry(name), tmp_path / "data", tmp_path / "out")["questions"] == len(right)


@pytest.mark.parametrize("content", ["!!", "aGVsbG8gaGVsbG8gaGVsbG8="], ids=["not base64", "no image"])
def test_an_unreadable_image_of_mmbench_is_an_error(content, tmp_path):
    """The published script takes the image before it."""
    mmbench(tmp_path)
    (table,) = tmp_path.glob("*.tsv")
    table.write_text(table.read_text().replace(text64(2), content))
    with pytest.raises(DataError, match=r"\b2\b.*(JPEG|base64)"):
        prepare(entry("mmbench"), tmp_path, tmp_path / "out")


def test_a_damaged_image_is_found_before_it_is_asked_about(tmp_path):
    mmbench(tmp_path)
    (table,) = tmp_path.glob("*.tsv")
    whole = base64.b64decode(text64(2))
    cut = base64.b64encode(whole[: len(whole) // 2]).decode()
    table.write_text(table.read_text().replace(text64(2), cut))
    with pytest.raises(DataError, match=r"1 of \d images cannot be shown to a model: question 2: the image is damaged"):
        prepare(entry("mmbench"), tmp_path, tmp_path / "out")


def test_object_halbench_of_replies_that_name_nothing_is_zero(tmp_path):
    LAYOUTS["objhal"][0](tmp_path)
    prepare(entry("objhal"), tmp_path, tmp_path / "out")
    lines(tmp_path / "answers.jsonl", [{"question_id": q.id, "text": "No."} for q in read_questions(tmp_path / "out")])
    lines(tmp_path / "judge.jsonl", [])
    result = score_files(
        "objhal", [tmp_path / "out/references.jsonl"], [tmp_path / "answers.jsonl"], judge=tmp_path / "judge.jsonl"
    )
    assert result["headline"]["value"] == 0
    rates = [value for name, value in result["metrics"].items() if "rate" in name]
    assert rates
    assert not any(rates), result["metrics"]
