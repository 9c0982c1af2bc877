"""Every benchmark reads its official files: a small copy of each layout is prepared and scored."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmpipe.benchmarks.base import get, names
from mmpipe.benchmarks.mme import COGNITION, PERCEPTION
from mmpipe.benchmarks.prepare import prepare, read_questions
from mmpipe.benchmarks.records import read_document
from mmpipe.benchmarks.scoring import convert_files, score_files
from mmpipe.benchmarks.spec import BenchmarkEntry
from mmpipe.errors import DataError


def jpeg(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 255 - shade, shade // 2)).save(out, "JPEG")
    return out.getvalue()


def text64(shade: int) -> str:
    return base64.b64encode(jpeg(shade)).decode()


def pictures(folder: Path, *files: str) -> None:
    for shade, name in enumerate(files):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(10 + shade))


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def hub(shade: int) -> dict[str, Any]:
    return {"bytes": jpeg(shade), "path": "x.jpg"}


def mmbench(root: Path) -> list[str]:
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    head += ["source", "l2-category", "comment", "split"]
    rows = []
    for index in (1, 2):
        cell = text64(index)
        options = ["cat", "dog"]
        rows.append([index, "What?", "", *options, "", "nan", "A", "c", cell, "s", "l", "", "dev"])
        rows.append(
            [
                index + 10**6,
                "What?",
                "Look.",
                *options[::-1],
                "",
                "",
                "B",
                "c",
                str(index),
                "s",
                "l",
                "",
                "dev",
            ]
        )
    with (root / "mmbench_dev_en_20231003.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([head, *rows])
    return ["A", "B", "A", "B"]


def pope(root: Path) -> list[str]:
    pictures(root / "val2014", "a.jpg", "b.jpg")
    for category in ("adversarial", "popular", "random"):
        lines(
            root / f"coco/coco_pope_{category}.json",
            [
                {"question_id": 1, "image": "a.jpg", "text": "Is there a cat?", "label": "yes"},
                {"question_id": 2, "image": "b.jpg", "text": "Is there a cat?", "label": "no"},
            ],
        )
    return ["Yes", "No"] * 3


def mme(root: Path) -> list[str]:
    for shade, category in enumerate((*PERCEPTION, *COGNITION)):
        nested = category in ("posters", "celebrity", "scene", "landmark", "artwork")
        folder = root / "MME_Benchmark_release_version" / category
        image = folder / "images" if nested else folder
        text = folder / "questions_answers_YN" if nested else folder
        image.mkdir(parents=True)
        text.mkdir(exist_ok=True)
        (image / "0001.png").write_bytes(jpeg(shade))
        (text / "0001.txt").write_text(
            "Is it red? Please answer yes or no.\tYes\nIs it blue?  Please answer yes or no.\tNo\n"
        )
    return ["Yes", "No"] * 14


def textvqa(root: Path) -> list[str]:
    pictures(root / "train_images", "i1.jpg")
    data = [
        {"question_id": n, "image_id": "i1", "question": f"What Brand {n}?", "answers": ["nokia"] * 10}
        for n in (7, 8)
    ]
    dump(root / "TextVQA_0.5.1_val.json", {"data": data})
    dump(
        root / "TextVQA_Rosetta_OCR_v0.2_val.json",
        {"data": [{"image_id": "i1", "ocr_tokens": ["NOKIA", "3310"]}]},
    )
    return ["Nokia.", "nokia"]


def vizwiz(root: Path) -> list[str]:
    pictures(root / "val", "VizWiz_val_00000000.jpg")
    answers = [{"answer": "can", "answer_confidence": "yes"}] * 10
    dump(
        root / "val.json",
        [
            {
                "image": "VizWiz_val_00000000.jpg",
                "question": "What is this?",
                "answers": answers,
                "answerable": 1,
            }
        ],
    )
    return ["A can."]


def scienceqa(root: Path) -> list[str]:
    pictures(root / "test/5", "image.png")
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": None}
    dump(
        root / "problems.json",
        {
            "4": problem,
            "5": {**problem, "hint": "Look.", "image": "image.png"},
            "6": {**problem, "split": "train"},
        },
    )
    dump(root / "pid_splits.json", {"test": ["5", "4"], "train": ["6"]})
    return ["B", "B"]


def gqa(root: Path) -> list[str]:
    pictures(root / "images", "n1.jpg")
    dump(
        root / "testdev_balanced_questions.json",
        {"201": {"question": "Is it red?", "answer": "yes", "imageId": "n1", "isBalanced": True}},
    )
    return ["Yes."]


def vqav2(root: Path) -> list[str]:
    pictures(root / "val2014", "COCO_val2014_000000000042.jpg")
    question = {"question_id": 420, "image_id": 42, "question": "Cat?"}
    answers = [{"answer": "yes", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
    dump(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [question]})
    dump(
        root / "v2_mscoco_val2014_annotations.json",
        {"annotations": [{**question, "question_type": "is", "answer_type": "yes/no", "answers": answers}]},
    )
    return ["Yes"]


def ai2d(root: Path) -> list[str]:
    row = {"question": "Which?", "options": ["leaf", "stem"], "answer": "1", "image": hub(3)}
    parquet(root / "data/test-00000-of-00002.parquet", [row])
    parquet(root / "data/test-00001-of-00002.parquet", [row])
    return ["B", "b."]


def mmstar(root: Path) -> list[str]:
    row = {"index": 0, "question": "<image 1>\nWhich?\nOptions: A: a, B: b", "answer": "B", "image": jpeg(4)}
    parquet(root / "mmstar.parquet", [{**row, "category": "math", "l2_category": "geometry"}])
    return ["b"]


def chartqa(root: Path) -> list[str]:
    pictures(root / "png", "1.png", "2.png")
    dump(root / "test_human.json", [{"imgname": "1.png", "query": "How many?", "label": "14"}])
    dump(root / "test_augmented.json", [{"imgname": "2.png", "query": "Which?", "label": "Yes"}])
    return ["14.5", "yes"]


def mmmu(root: Path) -> list[str]:
    row = {
        "id": "validation_Art_1", "question": "What is <image 1>?", "options": "['one', '<image 2>']", "answer": "B",
        "question_type": "multiple-choice", "image_1": hub(5), "image_2": hub(6),
    }  # fmt: skip
    parquet(root / "Art/validation-00000-of-00001.parquet", [row])
    parquet(root / "Art/test-00000-of-00001.parquet", [{**row, "id": "test_Art_1"}])
    open_row = {
        **row,
        "id": "validation_Math_1",
        "options": "[]",
        "answer": "['3', '4']",
        "question_type": "open",
    }
    parquet(root / "Math/validation-00000-of-00001.parquet", [open_row])
    return ["(B)", "It is 4"]


def mathvista(root: Path) -> list[str]:
    pictures(root / "images", "1.jpg")
    record = {
        "question": "How many?", "image": "images/1.jpg", "choices": None, "unit": None, "precision": None,
        "answer": "3", "question_type": "free_form", "answer_type": "integer", "query": "Hint: x\nQuestion: How many?",
        "metadata": {"skills": ["a"]},
    }  # fmt: skip
    dump(root / "testmini.json", {"1": record})
    return ["3"]


def hallusionbench(root: Path) -> list[str]:
    pictures(root / "hallusion_bench", "VD/chart/0_0.png")
    record = {
        "category": "VD", "subcategory": "chart", "visual_input": "1", "set_id": "0", "figure_id": "0",
        "question_id": "0", "question": "Is it?", "gt_answer_details": "Yes.", "gt_answer": "1",
        "filename": "./VD/chart/0_0.png",
    }  # fmt: skip
    unseen = {"category": "VS", "visual_input": "0", "filename": None}
    dump(root / "HallusionBench.json", [record, {**record, **unseen}])
    return ["Yes", "Maybe"]


def mmhal(root: Path) -> list[str]:
    record = {"question": "What?", "gt_answer": "A cat.", "image_content": ["Cat"], "image": text64(7)}
    lines(root / "mmhal-bench_with_image.jsonl", [record] * 8)
    return ["A cat."] * 8


def objhal(root: Path) -> list[str]:
    lines(
        root / "obj_halbench_300_with_image.jsonl",
        [
            {"image": text64(8), "question": "Describe.", "image_id": 9},
            {"image": text64(9), "question": "?", "image_id": 8},
        ],
    )
    (root / "synonyms_refine.txt").write_text("person, man, woman\ndog, puppy\ntraffic light, street light\n")
    instances = {
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [{"image_id": 9, "category_id": 1}],
    }
    dump(root / "annotations/instances_val2014.json", instances)
    captions = [{"image_id": 8, "caption": "Two puppies under the street lights"}]
    dump(root / "annotations/captions_val2014.json", {"annotations": captions})
    return ["A man walks along there.", "A puppy and a woman stand there."]


def seed(root: Path) -> list[str]:
    pictures(root / "SEED-Bench-image", "1_2")
    record = {f"choice_{letter}": letter for letter in "abcd"} | {"question": "Which?", "answer": "C"}
    record |= {"question_id": "101", "question_type_id": 1, "data_type": "image", "data_id": "1_2"}
    video = {**record, "question_id": "v1", "data_type": "video"}
    dump(root / "SEED-Bench.json", {"questions": [record, video], "question_type": {"Scene": 1}})
    return ["C"]


def mmvet(root: Path) -> list[str]:
    pictures(root / "images", "v1_0.png")
    dump(root / "mm-vet.json", {"v1_0": {"imagename": "v1_0.png", "question": "Why?", "answer": "So."}})
    return ["Because."]


# benchmark -> (how its files are made, with the right answers; the first question's text)
LAYOUTS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "ai2d": (
        ai2d,
        "Which?\nA. leaf\nB. stem\nAnswer with the option's letter from the given choices directly.",
    ),
    "chartqa": (chartqa, "How many?\nAnswer the question with a single word."),
    "gqa": (gqa, "Is it red?\nAnswer the question using a single word or phrase."),
    "hallusionbench": (hallusionbench, "Is it?"),
    "mathvista": (mathvista, "Hint: x\nQuestion: How many?"),
    "mmbench": (
        mmbench,
        "What?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly.",
    ),
    "mme": (mme, "Is it red?\nAnswer the question using a single word or phrase."),
    "mmhal": (mmhal, "What?"),
    "mmmu": (
        mmmu,
        "What is <image>?\n(A) one\n(B) <image>\n\nAnswer with the option's letter from the given choices directly.",
    ),
    "mmstar": (
        mmstar,
        "Which?\nOptions: A: a, B: b\nAnswer with the option's letter from the given choices directly.",
    ),
    "mmvet": (mmvet, "Why?"),
    "objhal": (objhal, "Describe."),
    "pope": (pope, "Is there a cat?\nAnswer the question using a single word or phrase."),
    "scienceqa": (
        scienceqa,
        "<image>\nContext: Look.\nWhich?\nA. a\nB. b\nAnswer with the option's letter from the given choices directly.",
    ),
    "seed": (
        seed,
        "Which?\nA. a\nB. b\nC. c\nD. d\nAnswer with the option's letter from the given choices directly.",
    ),
    "textvqa": (
        textvqa,
        "What Brand 7?\nReference OCR token: NOKIA, 3310\nAnswer the question using a single word or phrase.",
    ),
    "vizwiz": (
        vizwiz,
        "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase.",
    ),
    "vqav2": (vqav2, "Cat?\nAnswer the question using a single word or phrase."),
}
VERDICTS = {"hallusionbench": "correct", "mmhal": "Rating: 6", "mathvista": "3", "objhal": '["man"]'}


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
    assert {p.name for q in questions for p in q.images} == {
        p.name for p in (tmp_path / "out/images").iterdir()
    }
    for question in questions:
        assert question.text.count("<image>") in (0, len(question.images))

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


@pytest.mark.parametrize(
    ("name", "where"), [("ai2d", "data"), ("mmmu", "."), ("mme", "MME_Benchmark_release_version")]
)
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


def test_pictures_may_not_lead_out_of_the_data_set(tmp_path):
    pope(tmp_path)
    for name in ("../../etc/passwd", "/etc/passwd"):
        record = {"question_id": 1, "image": name, "text": "?", "label": "yes"}
        lines(tmp_path / "coco/coco_pope_adversarial.json", [record, {**record, "question_id": 2}])
        with pytest.raises(DataError, match=r"outside|is not there"):
            prepare(entry("pope"), tmp_path, tmp_path / "out")
