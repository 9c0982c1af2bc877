"""What the scoring of files promises, whatever the benchmark."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mmpipe import registry
from mmpipe.benchmarks.base import Question, get, names
from mmpipe.benchmarks.compare import compare
from mmpipe.benchmarks.jsonl import Document
from mmpipe.benchmarks.prepare import prepare, read_questions, shuffle_images
from mmpipe.benchmarks.scoring import convert_files, describe, score_files
from mmpipe.benchmarks.spec import BenchmarkEntry
from mmpipe.benchmarks.stats import bootstrap, estimate_mean, wilson
from mmpipe.errors import ConfigError, DataError

ROWS = [
    {"index": i + r * 10**6, "question": f"Q{i}", "A": "cat", "B": "dog", "answer": "AB"[(i + r) % 2], "split": "dev"}
    for i in (1, 2, 3)
    for r in (0, 1)
]


@pytest.fixture
def references(tmp_path: Path) -> Path:
    path = tmp_path / "references.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def answers(path: Path, changes: dict | None = None, leave: int = 0) -> Path:
    replies = {row["index"]: row["answer"] for row in ROWS[leave:]} | (changes or {})
    path.write_text("".join(json.dumps({"question_id": i, "text": t}) + "\n" for i, t in replies.items()))
    return path


def test_settings_and_interface_load_nothing_heavy():
    code = """
        import sys
        import mmpipe.benchmarks.base, mmpipe.benchmarks.spec
        mmpipe.benchmarks.base.names()
        heavy = {"torch", "transformers", "datasets", "pandas", "pyarrow", "numpy"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_a_new_file_is_a_new_benchmark(tmp_path, monkeypatch):
    package = importlib.import_module("mmpipe.benchmarks")
    (tmp_path / "mine.py").write_text(
        "from mmpipe.benchmarks.pope import Pope\n\n\nclass Mine(Pope):\n    name = 'mine'\n\n\nBENCHMARK = Mine()\n"
    )
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    registry.names.cache_clear()
    registry.modules.cache_clear()
    try:
        assert "mine" in names()
        assert get("mine").name == "mine"
    finally:
        registry.names.cache_clear()
        registry.modules.cache_clear()
        sys.modules.pop("mmpipe.benchmarks.mine", None)


def test_every_benchmark_is_described():
    for name in names():
        task = get(name)
        assert task.name == name
        known = [p.name for p in task.protocols] + [a for p in task.protocols for a in p.aliases]
        assert len(known) == len(set(known)), name
        assert all(p.about for p in task.protocols)
        assert task.protocol() is task.protocol("official") is task.protocols[0]


def test_the_list_of_benchmarks_is_json():
    rows = json.loads(json.dumps(describe()))
    assert [row["benchmark"] for row in rows] == names()
    assert all(row["about"] and row["files"] and row["protocols"] for row in rows)


def test_pope_numbers_are_unique_across_categories(tmp_path):
    label = {"image": "a.jpg", "text": "?", "label": "yes"}
    for category in ("adversarial", "popular", "random"):
        (tmp_path / f"coco_pope_{category}.json").write_text(
            "".join(json.dumps({**label, "question_id": n}) + "\n" for n in (1, 2))
        )
    asked = get("pope").read_references(sorted(tmp_path.glob("*.json")))
    assert [r["question_id"] for r in asked] == [1, 2, 20_000_001, 20_000_002, 10_000_001, 10_000_002]
    by_category = [{"question_id": 2, "category": r["category"], "text": "Yes"} for r in asked[1::2]]
    assert get("pope").score(asked, by_category).as_json()["missing"] == 3


def test_pope_without_a_single_yes_is_zero():
    labels = [{"question_id": n, "image": "a.jpg", "text": "?", "label": label} for n, label in ((1, "yes"), (2, "no"))]
    asked = get("pope").parse_references([Document("coco_pope_random.json", labels)])
    for protocol in ("llava", "lmms", "vlmevalkit"):
        for answers in ([], [{"question_id": row["question_id"], "text": "No"} for row in asked]):
            score = get("pope").score(asked, answers, protocol).as_json()
            numbers = json.loads(json.dumps(score, allow_nan=False))
            assert numbers["missing"] == 2 - len(answers)
            if protocol == "llava":
                assert numbers["headline"]["value"] == 0
                of_all = score["metrics"]["random"]
                assert (of_all["precision"], of_all["recall"], of_all["f1"]) == (0, 0, 0)
                assert of_all["accuracy"] == (0.5 if answers else 0)


def test_mme_needs_prompts():
    asked = [{"question_id": "count/1.jpg", "category": "count", "question": "One?", "answer": "Yes"}]
    with pytest.raises(DataError, match="has no 'prompt'"):
        get("mme").score(asked, [{"question_id": "count/1.jpg", "text": "Yes"}])


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'mmbench'"):
        get("mmbnech")
    with pytest.raises(ConfigError, match="did you mean 'circular'"):
        get("mmbench").protocol("circlar")
    with pytest.raises(ConfigError, match="did you mean 'questions'"):
        get("mmbench").source(Path("."), {"question": "x"})


def test_right_answers_score_one(references, tmp_path):
    result = score_files("mmbench", [references], [answers(tmp_path / "a.jsonl")])
    assert result["metrics"]["overall"] == 1
    assert (result["n"], result["missing"], result["unparsed"], result["duplicates"]) == (6, 0, 0, 0)
    assert result["protocol"] == "circular"
    assert result["lineage"]["answers"][0]["path"].endswith("a.jsonl")


def test_one_wrong_rotation_costs_the_question(references, tmp_path):
    path = answers(tmp_path / "a.jsonl", {ROWS[1]["index"]: "I do not know"})
    result = score_files("mmbench", [references], [path], per_item=tmp_path / "items.jsonl")
    assert result["metrics"]["overall"] == pytest.approx(2 / 3)
    assert result["unparsed"] == 1
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [item["correct"] for item in items] == [True, False, True, True, True, True]
    assert items[1]["unit"] == "1"
    vanilla = score_files("mmbench", [references], [path], protocol="vanilla")
    assert vanilla["metrics"]["overall"] == 1
    assert vanilla["n"] == 3


def test_missing_answers_are_wrong_and_counted(references, tmp_path):
    result = score_files("mmbench", [references], [answers(tmp_path / "a.jsonl", leave=2)])
    assert result["missing"] == 2
    assert result["metrics"]["overall"] == pytest.approx(2 / 3)
    assert score_files("mmbench", [references], [answers(tmp_path / "e.jsonl", leave=6)])["metrics"]["overall"] == 0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"question_id": 1, "text": "A"}\n{"question_id": "1", "text": "B"}\n', "more than one answer to: 1"),
        ('{"question_id": 1, "text": "A"}\n{"question_id": 77, "text": "B"}\n', "do not exist: 77"),
        ('{"question_id": 901, "text": "A"}\n{"question_id": 902, "text": "B"}\n', "another split"),
        ('{"question_id": 1, "text": "A"}\n{"question_id": 2, "te', "line 2: not a JSON record"),
        ('{"question_id": 1, "text": 3}\n', "'text' must be a string"),
        ('{"text": "A"}\n', "needs 'question_id'"),
        ("[1, 2]\n", "record 1: an answer is an object with 'question_id' and 'text', found a int"),
        ('[{"question_id": 1, "text": "A"}, {"question_id": 1, "text": "B"}]', "more than one answer to: 1"),
        ('[{"question_id": 1, "text": "A"}, {"text": "B"}]', r"record 2: .* needs 'question_id' .*it has text"),
    ],
)
def test_errors_of_bad_answers_name_the_place(references, tmp_path, lines, message):
    path = tmp_path / "a.jsonl"
    path.write_text(lines)
    with pytest.raises(DataError, match=message):
        score_files("mmbench", [references], [path])


def test_marks_line_ends_and_kinds_of_ids_do_not_matter(references, tmp_path):
    plain = answers(tmp_path / "a.jsonl")
    odd = tmp_path / "odd.jsonl"
    records = [json.loads(line) for line in plain.read_text().splitlines()]
    text = "\r\n".join(json.dumps({**r, "question_id": f" {r['question_id']} "}) for r in reversed(records))
    odd.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    odd_references = tmp_path / "odd_references.json"
    odd_references.write_bytes(b"\xef\xbb\xbf" + json.dumps([{**r, "index": float(r["index"])} for r in ROWS]).encode())
    first, second = (score_files("mmbench", [r], [a]) for r, a in ((references, plain), (odd_references, odd)))
    assert first["metrics"] == second["metrics"]


def test_answers_may_lie_in_several_files(references, tmp_path):
    records = answers(tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    parts = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for part, some in zip(parts, (records[:2], records[2:]), strict=True):
        part.write_text("".join(some))
    assert score_files("mmbench", [references], parts)["metrics"]["overall"] == 1


def test_files_that_are_not_there_or_not_text(references, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        score_files("mmbench", [references], [tmp_path / "none.jsonl"])
    (tmp_path / "binary.jsonl").write_bytes(b"[\xe9]")
    with pytest.raises(DataError, match="not UTF-8"):
        score_files("mmbench", [references], [tmp_path / "binary.jsonl"])
    (tmp_path / "table.tsv").write_text("index\tquestion\n1\n")
    with pytest.raises(DataError, match=r"table\.tsv, line 2: 1 cells where the header has 2"):
        score_files("mmbench", [tmp_path / "table.tsv"], [answers(tmp_path / "a.jsonl")])
    (tmp_path / "wrong.json").write_text('[{"index": 1, "question": "?"}]')
    with pytest.raises(DataError, match=r"lacks A, B"):
        score_files("mmbench", [tmp_path / "wrong.json"], [answers(tmp_path / "a.jsonl")])


def test_references_given_twice_are_an_error(references, tmp_path):
    with pytest.raises(DataError, match="hold the question 1 twice"):
        score_files("mmbench", [references, references], [answers(tmp_path / "a.jsonl")])


def test_replies_are_text_in_the_sheet(references, tmp_path):
    from openpyxl import load_workbook

    replies = {1: "=HYPERLINK(1)", 2: "+1", 3: "-1", 1000001: "@x", 1000002: "a\x00b\x0b", 1000003: "x" * 100_000}
    report = convert_files("mmbench", [references], [answers(tmp_path / "a.jsonl", replies)], tmp_path / "out.xlsx")
    assert (report["cells_cleaned"], report["cells_cut"]) == (1, 1)
    header, *rows = load_workbook(tmp_path / "out.xlsx")["Sheet1"].iter_rows()
    column = [cell.value for cell in header].index("prediction")
    cells = {row[0].value: row[column] for row in rows}
    assert {i: (c.data_type, c.value[:20]) for i, c in cells.items() if c.value} == {
        1: ("s", "=HYPERLINK(1)"),
        2: ("s", "+1"),
        3: ("s", "-1"),
        1000001: ("s", "@x"),
        1000002: ("s", "ab"),
        1000003: ("s", "x" * 20),
    }


def test_judged_and_unjudged_scores_name_their_protocols(tmp_path):
    record = {"category": "VD", "subcategory": "c", "set_id": "0", "figure_id": "0", "question_id": "0"}
    (tmp_path / "r.json").write_text(json.dumps([{**record, "question": "?", "gt_answer": "1"}]))
    (tmp_path / "a.jsonl").write_text('{"question_id": "VD_c_0_0_0", "text": "Yes"}\n')
    files = ([tmp_path / "r.json"], [tmp_path / "a.jsonl"])
    with pytest.raises(DataError, match=r"hallusionbench.*judge.*intern"):
        score_files("hallusionbench", *files, protocol="official")
    unjudged = score_files("hallusionbench", *files)
    assert (unjudged["protocol"], unjudged["metrics"]["aAcc"]) == ("intern", 1)
    (tmp_path / "b.jsonl").write_text('{"question_id": 0, "text": "Yes", "judge_reply": "Correct."}\n')
    carried = score_files("hallusionbench", files[0], [tmp_path / "b.jsonl"])
    assert (carried["protocol"], carried["metrics"]["aAcc"]) == ("hallusionbench", 100)
    (tmp_path / "j.jsonl").write_text('{"question_id": "VD_c_0_0_0", "reply": null}\n')
    failed = score_files("hallusionbench", *files, judge=tmp_path / "j.jsonl")
    assert (failed["metrics"]["aAcc"], failed["unparsed"]) == (0, 1)


def test_hundred_thousand_answers_take_seconds(tmp_path):
    n = 20_000
    people = [{"answer": "yes" if k < 5 else "two dogs", "answer_id": k} for k in range(10)]
    annotations = [
        {"question_id": i, "image_id": i // 3, "question_type": "is", "answer_type": "other", "answers": people}
        for i in range(n)
    ]
    (tmp_path / "a.json").write_text(json.dumps({"annotations": annotations}))
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"question_id": i, "text": f"The {i % 3} dogs."}) + "\n" for i in range(n))
    )
    start = time.process_time()
    result = score_files("vqav2", [tmp_path / "a.json"], [tmp_path / "p.jsonl"])
    assert result["n"] == n
    assert time.process_time() - start < 6  # a fifth of the answers, a fifth of the time


# ---- controls


def questions(count: int, per_image: int) -> list[Question]:
    return [
        Question(id=n, text="?", images=(Path(f"images/{n // per_image}.jpg"),), group=str(n // per_image))
        for n in range(count)
    ]


@pytest.mark.parametrize(("count", "per_image"), [(2, 1), (12, 4), (300, 3), (7, 2)])
def test_no_question_keeps_its_image_and_rotations_share_the_new_one(count, per_image):
    asked = questions(count, per_image)
    shuffled = shuffle_images(asked, seed="mmbench")
    assert shuffled == shuffle_images(asked, seed="mmbench")
    assert all(a.images != b.images for a, b in zip(asked, shuffled, strict=True))
    groups = {(q.group, q.images) for q in shuffled}
    assert len(groups) == len({q.group for q in asked})
    assert {q.images for q in shuffled} == {q.images for q in asked}


def test_one_image_cannot_be_shuffled():
    with pytest.raises(DataError, match="two different images"):
        shuffle_images(questions(3, 3), seed="x")


def test_a_limit_keeps_whole_groups(tmp_path):
    from mmpipe.demo.datasets import mmbench

    (tmp_path / "data").mkdir()
    mmbench(tmp_path / "data", seed=1, questions=9)
    table = next((tmp_path / "data").glob("*.tsv")).name
    entry = BenchmarkEntry(task="mmbench", data="d", files={"questions": table}, limit=4)
    facts = prepare(entry, tmp_path / "data", tmp_path / "out")
    asked = read_questions(tmp_path / "out")
    assert facts["groups"] == len({q.group for q in asked}) == 4
    rotations = {q.group: len(q.extra["options"]) for q in asked}
    assert len(asked) == sum(rotations.values())
    shuffled = entry.model_copy(update={"control": "shuffle_images"})
    prepare(shuffled, tmp_path / "data", tmp_path / "control")
    control = read_questions(tmp_path / "control")
    assert all(a.images[0].name != b.images[0].name for a, b in zip(asked, control, strict=True))
    assert [q.text for q in control] == [q.text for q in asked]


# ---- intervals and comparison


def test_wilson_interval():
    assert wilson(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_questions_about_one_image_are_one_unit():
    values = [1.0, 1.0, 0.0, 0.0] * 50
    alone = estimate_mean("m", values, [str(i) for i in range(200)])
    together = estimate_mean("m", values, [str(i // 2) for i in range(200)])
    assert alone.value == together.value == 0.5
    assert (alone.method, together.units) == ("wilson", 100)
    assert together.high - together.low > 1.2 * (alone.high - alone.low)


def test_many_units_have_nearly_the_bootstrap_interval():
    values = [float(i % 3 == 0) for i in range(12_000)]
    units = [str(i // 2) for i in range(12_000)]
    many = estimate_mean("m", values, units)
    assert many.method == "normal"
    table = {u: [values[2 * i] + values[2 * i + 1], 2.0] for i, u in enumerate(dict.fromkeys(units))}
    resampled = bootstrap("m", table, lambda t: t[..., 0] / t[..., 1], many.value)
    assert (many.low, many.high) == pytest.approx((resampled.low, resampled.high), abs=2e-3)


def test_comparison_has_a_row_a_checkpoint(references, tmp_path):
    score = score_files("mmbench", [references], [answers(tmp_path / "a.jsonl")], provenance={"checkpoint": "x"})
    worse = score_files("mmbench", [references], [answers(tmp_path / "b.jsonl", {1: "A"})])
    table = compare("mmbench", {"a@finetune": worse, "b": score}, controls={"b": worse})
    assert [(r["checkpoint"], r["score"], r["control"]) for r in table["rows"]] == [
        ("a@finetune", pytest.approx(2 / 3), False),
        ("b", 1.0, False),
        ("b", pytest.approx(2 / 3), True),
    ]
    assert (table["best"], table["metric"], table["n"]) == ("b", "overall", 6)
    assert table["rows"][1]["lineage"]["checkpoint"] == "x"
    assert table["seeds"] == []
    vanilla = score_files("mmbench", [references], [answers(tmp_path / "a.jsonl")], protocol="vanilla")
    with pytest.raises(DataError, match="different protocol"):
        compare("mmbench", {"a": score, "b": vanilla})


def test_checkpoints_that_differ_in_their_seed_are_averaged(references, tmp_path):
    good = score_files("mmbench", [references], [answers(tmp_path / "a.jsonl")])
    bad = score_files("mmbench", [references], [answers(tmp_path / "b.jsonl", {1: "A"})])
    family = {"a-1": "a-*", "a-2": "a-*", "b-1": "b-*"}
    table = compare("mmbench", {"a-1": bad, "b-1": bad, "a-2": good, "c": good}, family=family)
    (row,) = table["seeds"]
    assert (row["checkpoint"], row["of"], row["seeds"]) == ("a-*", ["a-1", "a-2"], 2)
    assert (row["score"], row["low"], row["high"]) == pytest.approx((5 / 6, 2 / 3, 1.0))
    assert row["sd"] == pytest.approx(math.sqrt(2) / 6), "the sample deviation: 1/6 from the mean twice, divided by 1"
    assert len(table["rows"]) == 4


# ---- GQA's figures beside accuracy


def gqa_questions() -> dict[str, dict]:
    return {
        "1": {"answer": "red", "isBalanced": True, "entailed": ["1", "2", "3", "9"]},
        "2": {"answer": "yes", "isBalanced": False, "entailed": ["2"]},
        "3": {"answer": "no", "isBalanced": True, "entailed": []},
        "4": {"answer": "left", "isBalanced": True, "entailed": ["2"]},
    }


def test_gqa_consistency_counts_what_was_asked(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps(gqa_questions()))
    replies = {"1": "Red.", "2": "yes", "3": "yes", "4": "right"}
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"question_id": i, "text": t}) + "\n" for i, t in replies.items())
    )
    metrics = score_files("gqa", [tmp_path / "q.json"], [tmp_path / "a.jsonl"])["metrics"]
    assert metrics["accuracy"] == pytest.approx(100 / 3)  # the balanced ones
    assert metrics["consistency"] == 50  # of question 1, whose entailed 2 is right and 3 is not
    assert "validity" not in metrics
    choices = {i: {"valid": ["red", "blue", "right"], "plausible": ["red"]} for i in replies}
    (tmp_path / "val_choices.json").write_text(json.dumps(choices))
    files = [tmp_path / "q.json", tmp_path / "val_choices.json"]
    metrics = score_files("gqa", files, [tmp_path / "a.jsonl"])["metrics"]
    assert metrics["validity"] == pytest.approx(200 / 3)
    assert metrics["plausibility"] == pytest.approx(100 / 3)
    (tmp_path / "val_choices.json").write_text(json.dumps({"7": choices["1"]}))
    with pytest.raises(DataError, match="choices lack the question 1"):
        score_files("gqa", files, [tmp_path / "a.jsonl"])


def test_gqa_leaves_out_metrics_without_data(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps({"1": {"answer": "red", "entailed": ["1", "8"]}}))
    (tmp_path / "a.jsonl").write_text('{"question_id": "1", "text": "red"}\n')
    metrics = score_files("gqa", [tmp_path / "q.json"], [tmp_path / "a.jsonl"])["metrics"]
    assert not {"consistency", "validity", "plausibility", "grounding"} & set(metrics)


# ---- the words of Object HalBench


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's dog beside the women’s buses", ["man", "dog", "woman", "bus"]),
        ("Two gentlemen with knives, scarves and an iPhone", ["gentleman", "knife", "iphone"]),
        ("wine glasses near the toilet seats", ["wine glass", "toilet"]),
        ("hot-dogs and a hot dog", ["hot dog"]),
        ("a baby elephant, puppies, sheep and the boys' skis", ["elephant", "puppy", "sheep", "boy", "ski"]),
        ("Nothing of it is here", []),
    ],
)
def test_words_are_found_in_singular_and_plural(text, words):
    from mmpipe.benchmarks.objhal import SynonymTable

    classes = dict.fromkeys(("man", "woman", "gentleman", "boy"), "person") | {"iPhone": "cell phone", "puppy": "dog"}
    names = ("dog", "bus", "knife", "wine glass", "toilet", "hot dog", "elephant", "sheep", "ski")
    assert SynonymTable(classes | {name: name for name in names}).in_text(text) == words


def test_hallusionbench_measures_the_bias_to_yes():
    task = get("hallusionbench")
    rows = [
        {"category": "VD", "subcategory": "c", "set_id": "0", "figure_id": "1", "question_id": str(n), "question": "?",
         "gt_answer": gold, "visual_input": "1"}
        for n, gold in enumerate("1100")
    ]  # fmt: skip
    asked = task.parse_references([Document("x", rows)])
    answers = [{"question_id": r["key"], "text": "Yes"} for r in asked]
    judged = [{"question_id": r["key"], "reply": "correct" if r["gt_answer"] == "1" else "incorrect"} for r in asked]
    metrics = task.score(asked, answers, "hallusionbench", judged).metrics
    assert (metrics["aAcc"], metrics["yes_pct_diff"], metrics["fp_ratio"]) == (50, 0.5, 1)
