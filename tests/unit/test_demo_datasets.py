"""The made data sets have the real layouts, say the truth, and keep training and benchmark apart."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmpipe.demo import datasets
from mmpipe.demo.scenes import ATTRIBUTES, BACKGROUNDS, LETTER_ANSWER, LETTERS, PIXELS, QUESTIONS, SHORT_ANSWER, Choice
from mmpipe.errors import DataError

CHOICE = re.compile(rf"(?:<image>\n)?(?P<question>.+)\n(?P<options>(?:[A-D]\. .+\n){{2,4}}){re.escape(LETTER_ANSWER)}")
ROTATION = 1_000_000


def make(maker: Callable[..., None], out: Path, **options: Any) -> Path:
    out.mkdir(parents=True)
    maker(out, **options)
    return out


def tree(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def dialogue(record: dict[str, Any]) -> list[tuple[str, str]]:
    turns = record["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    texts = [turn["value"] for turn in turns]
    return list(zip(texts[::2], texts[1::2], strict=True))


def options_of(question: str) -> tuple[str, dict[str, str]]:
    """The bare question and its options by letter."""
    match = CHOICE.fullmatch(question)
    assert match is not None, question
    return match["question"], dict(line.split(". ", 1) for line in match["options"].splitlines())


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(datasets.conversations, tmp_path_factory.mktemp("made") / "mix", seed=1, records=600, text_only=0.1)


@pytest.fixture(scope="module")
def records(conversations: Path) -> list[dict[str, Any]]:
    return json.loads((conversations / "llava_v1_5_mix665k.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    out = make(datasets.mmbench, tmp_path_factory.mktemp("made") / "mmbench", seed=2, questions=90)
    csv.field_size_limit(1 << 24)
    with next(out.glob("mmbench_dev_*.tsv")).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize(
    ("maker", "options"),
    [
        (datasets.captions, {"records": 12}),
        (datasets.conversations, {"records": 24}),
        (datasets.digits, {"records": 12}),
        (datasets.mmbench, {"questions": 12}),
    ],
)
def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, maker: Callable[..., None], options: Any) -> None:
    first = tree(make(maker, tmp_path / "first", seed=0, **options))
    assert tree(make(maker, tmp_path / "again", seed=0, **options)) == first
    assert tree(make(maker, tmp_path / "other", seed=1, **options)) != first


def test_captions_are_laid_out_like_llava_pretrain(tmp_path: Path) -> None:
    root = make(datasets.captions, tmp_path / "captions", seed=0, records=30)
    records = json.loads((root / "blip_laion_cc_sbu_558k.json").read_text(encoding="utf-8"))
    assert len({record["id"] for record in records}) == 30
    for record in records:
        assert set(record) == {"id", "image", "conversations"}
        [(asked, caption)] = dialogue(record)
        instruction = asked.replace("<image>", "").strip()
        assert asked in (f"{instruction}\n<image>", f"<image>\n{instruction}")
        assert instruction in datasets.INSTRUCTIONS
        assert "background" in caption
        assert re.fullmatch(r"\d{5}/\d{9}\.jpg", record["image"])
        with Image.open(root / "images" / record["image"]) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (PIXELS, PIXELS))


def test_conversations_come_from_several_folders_and_some_have_no_image(
    conversations: Path, records: list[dict[str, Any]]
) -> None:
    folders: dict[str, int] = defaultdict(int)
    for record in records:
        folders[str(Path(record["image"]).parent) if "image" in record else "none"] += 1
        questions = "\n".join(question for question, _ in dialogue(record))
        assert questions.count("<image>") == ("image" in record)
        assert questions.startswith("<image>\n") == ("image" in record)
        assert "image" not in record or (conversations / record["image"]).is_file()
    assert set(folders) == {"coco/train2017", "gqa/images", "none"}
    assert 30 <= folders["none"] <= 90
    assert folders["coco/train2017"] > folders["gqa/images"] > 100


def test_word_conversations_say_once_what_form_of_answer_is_wanted(records: list[dict[str, Any]]) -> None:
    asked_as = {question: name for name, question in QUESTIONS.items()}
    by_word = [record for record in records if record.get("image", "").startswith("gqa")]
    for record in by_word:
        turns = dialogue(record)
        assert len(turns) == 2
        first, second = (question.removeprefix("<image>\n").removesuffix(f"\n{SHORT_ANSWER}") for question, _ in turns)
        assert turns[0][0] == f"<image>\n{first}\n{SHORT_ANSWER}"
        assert turns[1][0] == second
        for question, (_, answer) in zip((first, second), turns, strict=True):
            assert answer in ATTRIBUTES[asked_as[question]]


def test_letter_conversations_offer_all_values_in_circular_order(records: list[dict[str, Any]]) -> None:
    asked_as = {question: name for name, question in QUESTIONS.items()}
    sizes = set()
    for record in records:
        if record.get("image", "").startswith("coco"):
            [(text, letter)] = dialogue(record)
            question, options = options_of(text)
            values = ATTRIBUTES[asked_as[question]]
            start = values.index(options["A"])
            assert tuple(options.values()) == values[start:] + values[:start]
            assert letter in options
            sizes.add(len(options))
    assert sizes == {2, 3, 4}


def truths(root: Path, records: list[dict[str, Any]]) -> list[bool]:
    """Whether each answer about a background is what the corner of the image shows."""
    found = []
    for record in records:
        for text, answer in dialogue(record):
            if QUESTIONS["background"] in text and "image" in record:
                said = options_of(text)[1][answer] if LETTER_ANSWER in text else answer
                corner = np.asarray(Image.open(root / record["image"]))[:3, :3].mean()
                found.append(said == min(BACKGROUNDS, key=lambda name: abs(corner - BACKGROUNDS[name][0])))
    return found


def test_answers_are_true_of_the_images(conversations: Path, records: list[dict[str, Any]]) -> None:
    found = truths(conversations, records)
    assert all(found)
    assert len(found) > 100


@pytest.mark.parametrize(("wrong", "least", "most"), [(1.0, 0, 0), (0.2, 0.7, 0.9)])
def test_wrong_answers_have_the_given_share(tmp_path: Path, wrong: float, least: float, most: float) -> None:
    root = make(datasets.conversations, tmp_path / "mix", seed=6, records=600, text_only=0, wrong=wrong)
    told = json.loads((root / "llava_v1_5_mix665k.json").read_text(encoding="utf-8"))
    found = truths(root, told)
    assert len(found) > 100
    assert least <= sum(found) / len(found) <= most


def test_questions_about_words_are_answered_by_their_options(records: list[dict[str, Any]]) -> None:
    for record in records:
        if "image" not in record:
            [(text, letter)] = dialogue(record)
            question, options = options_of(text)
            assert question == f"Which option says {options[letter]}?"


def test_digits_are_those_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    targets = load_digits().target
    root = make(datasets.digits, tmp_path / "digits", seed=0, records=80)
    records = json.loads((root / "digits.json").read_text(encoding="utf-8"))
    forms = set()
    for record in records:
        [(text, answer)] = dialogue(record)
        assert text.startswith("<image>\nWhat digit is written?\n")
        by_letter = text.endswith(LETTER_ANSWER)
        said = options_of(text)[1][answer] if by_letter else answer
        assert said == datasets.DIGITS[targets[int(record["id"])]]
        forms.add(by_letter)
        with Image.open(root / record["image"]) as image:
            assert image.size == (PIXELS, PIXELS)
    assert len(records) == 80
    assert forms == {True, False}


def test_mmbench_has_the_official_columns(table: list[dict[str, str]]) -> None:
    columns = "index,question,hint,A,B,C,D,answer,category,image,source,l2-category,comment,split"
    assert ",".join(table[0]) == columns
    assert {row["split"] for row in table} == {"dev"}
    assert len({row["index"] for row in table}) == len(table)


def test_mmbench_rotates_every_question_as_often_as_it_has_options(table: list[dict[str, str]]) -> None:
    questions: dict[int, dict[int, dict[str, str]]] = defaultdict(dict)
    for row in table:
        rotation, question = divmod(int(row["index"]), ROTATION)
        questions[question][rotation] = row
    assert len(questions) == 90
    sizes = set()
    for rotations in questions.values():
        options = [[row[letter] for letter in LETTERS if row[letter]] for _, row in sorted(rotations.items())]
        sizes.add(len(options[0]))
        assert sorted(rotations) == list(range(len(options[0])))
        assert options == [options[0][turn:] + options[0][:turn] for turn in rotations]
        assert len({row[row["answer"]] for row in rotations.values()}) == 1
        assert len({row["answer"] for row in rotations.values()}) == len(options[0])
        for column in ("question", "image", "category", "l2-category"):
            assert len({row[column] for row in rotations.values()}) == 1
    assert sizes == {2, 3, 4}


def test_mmbench_answers_are_true_of_the_images(table: list[dict[str, str]]) -> None:
    asked = [row for row in table if row["question"] == QUESTIONS["background"]]
    for row in asked:
        corner = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["image"], validate=True))))[:3, :3].mean()
        assert row[row["answer"]] == min(BACKGROUNDS, key=lambda name: abs(corner - BACKGROUNDS[name][0]))
    assert len(asked) == 15 * 3


def test_no_benchmark_image_is_among_those_of_training(conversations: Path, tmp_path: Path) -> None:
    """Even from one seed, for which nothing but the held-out rule keeps them apart."""
    table = make(datasets.mmbench, tmp_path / "mmbench", seed=1, questions=300)
    tested = {line.split("\t")[9] for line in next(table.glob("*.tsv")).read_text().splitlines()[1:]}
    trained = {base64.b64encode(path.read_bytes()).decode() for path in conversations.rglob("*.jpg")}
    assert len(tested) == 300
    assert not tested & trained


def test_a_choice_needs_its_answer_among_two_to_four_options() -> None:
    with pytest.raises(DataError, match="'d' must be one of two to four options"):
        Choice("Which?", ("a", "b"), "d")
    with pytest.raises(DataError, match="two to four"):
        Choice("Which?", ("a",), "a")
