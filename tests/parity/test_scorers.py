"""Every scorer against numbers that public code gave for the same synthetic replies (fixtures/vectors/benchmarks)."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mmpipe.benchmarks.base import Score, get
from mmpipe.benchmarks.jsonl import Document

VECTORS = Path(__file__).parent.parent / "fixtures" / "vectors" / "benchmarks"

# benchmark -> the protocol that repeats each recorded run; "" is the benchmark's own scorer
RUNS = {
    "ai2d": {"": "", "vlmevalkit_exact_matching": "vlmevalkit"},
    "chartqa": {"": "", "qwen_vl_swapped_arguments": "qwen"},
    "gqa": {"": ""},
    "hallusionbench": {"": "", "lmms_eval_intern_rule": "intern"},
    "mathvista": {
        "": "",
        "lmms_eval_0.7.2_precision_as_float": "libmoe",
        "lmms_eval_0.7.2_precision_int": "lmms",
        "vlmevalkit_prefetch_only": "vlmevalkit",
    },
    "mmbench": {"": "", "lmms_eval_0.7.2_static": "lmms"},
    "mme": {"": "", "lmms_eval_0.7.2": "lmms"},
    "mmhal": {"": ""},
    "mmmu": {"": ""},
    "mmstar": {"": "", "lmms_eval_0.7.2": "lmms", "libmoe_vendored_lmms_eval": "libmoe"},
    "objhal": {"": ""},
    "pope": {"": "", "lmms_eval": "lmms"},
    "scienceqa": {"": "", "lmms_eval_0.7.2": "lmms", "libmoe_vendored_lmms_eval": "libmoe"},
    "textvqa": {"": "", "lmms_eval_0.7.2": "lmms", "official_vqa_scorer": "vqa"},
    "vizwiz": {"": "", "vizwiz_api_on_raw_text": "raw", "lmms_eval_0.7.2": "lmms", "m4c_both_sides": "m4c"},
    "vqav2": {"": "", "official_on_raw_text": "raw", "lmms_eval": "lmms"},
}
# what a run recorded besides metrics
NOT_METRICS = {"printed_line", "n"}


def load(name: str) -> dict[str, Any]:
    return json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))


def references(name: str, vector: dict[str, Any]) -> list[dict[str, Any]]:
    content = vector["references"]
    if "synonyms" in vector:
        content = {"questions": content, "synonyms": vector["synonyms"]}
    return get(name).parse_references([Document(f"{name}.json", content)])


def assert_close(expected: Any, found: Any, where: str) -> None:
    if isinstance(expected, dict):
        for name, value in expected.items():
            if name not in NOT_METRICS:
                assert name in found, f"{where}/{name}"
                assert_close(value, found[name], f"{where}/{name}")
    elif isinstance(expected, str):
        assert found == expected, where
    else:
        assert found == pytest.approx(expected, abs=1e-6), where


def verdict(item: dict[str, Any]) -> float | None:
    """A recorded item as a score between 0 and 1; None where the run recorded no verdict."""
    if "accuracy_percent" in item:
        return item["accuracy_percent"] / 100
    value = item.get("correct", item.get("score"))
    return None if value is None else float(value)


@pytest.mark.parametrize(("name", "variant"), [(name, run) for name, runs in RUNS.items() for run in runs])
def test_scorer_repeats_the_public_code(name, variant):
    vector = load(name)
    expected = vector["expected"]
    if variant:
        expected = next(v["expected"] for v in vector["expected_variants"] if v["name"] == variant)
    asked = references(name, vector)
    if name == "scienceqa" and variant:  # these runs never saw the question that has no answer
        asked = [r for r in asked if r["question_id"] in {a["question_id"] for a in vector["answers"]}]
    score = get(name).score(asked, vector["answers"], RUNS[name][variant], vector.get("judge_replies"))
    assert_close(expected["metrics"], score.metrics, name)
    items = expected.get("per_item", [])
    if items and name not in ("mmhal", "objhal"):
        assert len(items) == len(score.items)
        for recorded, item in zip(items, score.items, strict=True):
            wanted = verdict(recorded)
            assert wanted is None or item.score == pytest.approx(wanted, abs=1e-4), recorded


@pytest.mark.parametrize("name", sorted(RUNS))
def test_references_survive_being_written_and_read(name):
    once = references(name, load(name))
    again = get(name).parse_references([Document("references.jsonl", json.loads(json.dumps(once)))])
    assert again == once


def test_mmhal_ratings():
    vector = load("mmhal")
    score = get("mmhal").score(references("mmhal", vector), vector["answers"], "", vector["judge_replies"])
    assert [i.facts["rating"] for i in score.items] == [i["score"] for i in vector["expected"]["per_item"]]


def objhal(**changes: Any) -> tuple[dict[str, Any], Score]:
    vector = load("objhal")
    replies = [{**reply, **changes} for reply in vector["judge_replies"]]
    return vector, get("objhal").score(references("objhal", vector), vector["answers"], "", replies)


def test_objhal_mentions():
    vector, score = objhal()
    for recorded, item in zip(vector["expected"]["per_item"], score.items, strict=True):
        assert item.facts["coco_mentions"] == recorded["coco_mentions"]
        assert item.facts["hallucinated"] == recorded["hallucinated"]
        assert item.facts["hallucinated_response"] == recorded["hallucinated_response"]


def test_objhal_rules_find_the_lemmas_that_spacy_finds():
    vector, score = objhal(extracted_objects=None)
    assert_close(vector["expected"]["metrics"], score.metrics, "objhal")


def test_objhal_object_lists():
    from mmpipe.benchmarks.objhal import listed_objects

    for item in load("objhal")["parse_object_list_items"]:
        parsed = item.get("parsed")
        names = isinstance(parsed, list) and all(isinstance(name, str) for name in parsed)
        assert listed_objects(item["reply"]) == (parsed if names else None), item


def test_objhal_two_word_objects():
    from mmpipe.benchmarks.objhal import SynonymTable, double_words

    vector = load("objhal")
    words = SynonymTable({**vector["synonyms"], "cell phone": "cell phone"})
    for item in vector["double_word_items"]:
        assert double_words(item["tokens"], words.pairs) == item["double_words"], item


def test_chair_counts_every_mention():
    """LLaVA-MoD's counting keeps repeated words; ours takes lists as they are given."""
    vector = load("_llava_mod_chair")
    synonyms = {"man": "person", "puppy": "dog", "kitten": "cat", "sofa": "couch", "bicycle": "bicycle"}
    synonyms |= {"car": "car", "truck": "truck"}
    captions = vector["inputs"]["captions"]
    asked = [
        {"image_id": c["image_id"], "gt_objects": vector["inputs"]["gt_objects"][str(c["image_id"])]} for c in captions
    ]
    score = get("objhal").score(
        get("objhal").parse_references([Document("x", {"questions": asked, "synonyms": synonyms})]),
        [{"question_id": i, "text": c["caption"]} for i, c in enumerate(captions)],
        "",
        [{"question_id": i, "reply": "", "extracted_objects": c["objs"]} for i, c in enumerate(captions)],
    )
    expected = vector["expected"]["overall"]
    ours = {
        "CHAIRs": "CHAIRs_all_responses",
        "obj_rec": "object_recall",
        "sentence_num": "n_responses",
        "coco_sentence_num": "n_responses_with_coco_mention",
        "correct_rate": "response_correct_percent",
        "object_correct_rate": "object_correct_percent",
    }
    for name, value in expected.items():
        found = score.metrics[ours.get(name, name)]
        assert found == pytest.approx(100 * value if name.endswith("rate") else value), name
    for item, caption in zip(score.items, vector["expected"]["per_caption"], strict=True):
        assert item.facts["coco_mentions"] == caption["mscoco_generated_words"]
        assert item.facts["hallucinated"] == [word for word, _ in caption["mscoco_hallucinated_words"]]
        assert item.facts["hallucinated_response"] == caption["metrics"]["CHAIRs"]


def test_chair_reads_lists_and_pairs_of_words():
    from mmpipe.benchmarks.objhal import SynonymTable, double_words, listed_objects

    vector = load("_llava_mod_chair")["expected"]
    for reply, names in vector["parse_object_list"].items():
        assert listed_objects(reply) == (None if names == "ValueError" else names), reply
    pairs = SynonymTable({"dining table": "dining table", "hot dog": "hot dog", "dog": "dog"}).pairs
    for phrase, words in vector["get_double_words_only"].items():
        assert double_words(phrase.split(), pairs) == words, phrase


def test_option_extraction():
    from mmpipe.benchmarks.multiple_choice import infer_option, infer_option_lmms

    for item in load("mmbench")["option_extraction_items"]:
        assert infer_option(item["text"], item["choices"]) == item["vlmevalkit_can_infer"], item
        assert infer_option_lmms(item["text"], item["choices"]) == item["lmms_eval_can_infer"], item


def test_answer_normaliser():
    from mmpipe.benchmarks.short_answer import evalai_normal

    rows = load("_llava_scorers")["answer_processor"]
    rows += load("_llava_mod_scorers")["expected"]["evalai_answer_processor"].items()
    for text, normal in rows:
        assert evalai_normal(text) == normal, text


def test_soft_accuracy():
    from mmpipe.benchmarks.short_answer import evalai_normal, soft_accuracy

    for case in load("_llava_scorers")["textvqa_soft"]:
        if "score" in case and len(case["gt"]) == 10:
            gold = [evalai_normal(text) for text in case["gt"]]
            assert soft_accuracy(evalai_normal(case["pred"]), gold) == pytest.approx(case["score"])


def test_question_of_a_textvqa_prompt():
    from mmpipe.benchmarks.textvqa import question_of_prompt

    rows = [*load("_llava_scorers")["textvqa_prompt_processor"]]
    rows += load("_llava_mod_scorers")["expected"]["textvqa_prompt_processor"].items()
    for prompt, question in rows:
        wanted = None if str(question).endswith("Error") else question
        assert question_of_prompt(prompt) == wanted, prompt


def test_pope_words():
    from mmpipe.benchmarks.yes_no import llava_pope

    for reply, label in load("_llava_scorers")["pope_text_to_label"]:
        assert llava_pope(reply) == label, reply


MOD = load("_llava_mod_scorers")["expected"]


def test_llava_mod_textvqa():
    cases = MOD["textvqa"]["cases"]
    asked = [{"question_id": i, "image_id": i, "question": "?", "answers": c["gt"]} for i, c in enumerate(cases)]
    score = get("textvqa").score(asked, [{"question_id": i, "text": c["pred"]} for i, c in enumerate(cases)])
    assert [item.score for item in score.items] == pytest.approx([case["score"] for case in cases])
    assert score.metrics["accuracy_exact"] == pytest.approx(100 * MOD["textvqa"]["mean"])


def test_llava_mod_pope():
    case = MOD["pope"]
    asked = [{"question_id": i, "label": label} for i, label in enumerate(case["labels"])]
    asked = get("pope").parse_references([Document("coco_pope_random.json", asked)])
    answers = [{"question_id": i, "text": text} for i, text in enumerate(case["answers"])]
    # the published scorer goes by line number; the order of the answers is nothing to ours
    score = get("pope").score(asked, answers[::-1])
    assert [item.parsed for item in score.items] == case["parsed"]
    printed = dict(line.split(": ") for line in case["printed"] if ": " in line)
    found = score.metrics["random"]
    for name, value in printed.items():
        assert found[name.removesuffix(" score").lower().replace(" ", "_")] == pytest.approx(float(value)), name
    tp, fp, tn, fn = map(int, case["printed"][1].split())
    right = [item.score == 1 for item in score.items]
    says = [(item.parsed, good) for item, good in zip(score.items, right, strict=True)]
    assert [says.count(kind) for kind in (("yes", True), ("yes", False), ("no", True), ("no", False))] == [
        tp,
        fp,
        tn,
        fn,
    ]
    # "NO", "I see none" and "Nothing" are a yes to this rule; others are a protocol away
    plain = get("pope").score(asked, answers, "lmms")
    read = {text: (o.parsed, p.parsed) for text, o, p in zip(case["answers"], score.items, plain.items, strict=True)}
    assert (read["NO"], read["Nothing"], read["I see none"]) == (("yes", "no"), ("yes", "other"), ("yes", "other"))


def test_llava_mod_scienceqa():
    case = MOD["scienceqa"]
    documents = [Document("problems.json", case["problems"]), Document("splits", {"test": list(case["problems"])})]
    task = get("scienceqa")
    score = task.score(task.parse_references(documents), case["predictions"])
    assert {item.id: item.parsed or "FAILED" for item in score.items} == case["parsed"]
    found = score.metrics
    assert found["accuracy"] == pytest.approx(case["acc"])
    assert case["printed"] == (
        f"Total: {found['count']}, Correct: {found['correct']}, Accuracy: {found['accuracy']:.2f}%, "
        f"IMG-Accuracy: {found['img_accuracy']:.2f}%"
    )
    assert [item.id for item in score.items if not item.answered] == ["9"]


def test_llava_mod_mmhal():
    case = MOD["mmhal"]
    places = range(len(case["reviews"]))
    asked = [{"question": "?", "gt_answer": "", "image_content": []} for _ in places]
    score = get("mmhal").score(
        get("mmhal").parse_references([Document("mmhal", asked)]),
        [{"question_id": i, "text": "So."} for i in places],
        "",
        [{"question_id": i, "reply": review} for i, review in enumerate(case["reviews"])],
    )
    assert [item.facts["rating"] for item in score.items] == case["scores"]
    assert score.metrics["average_score_exact"] == pytest.approx(case["average"])
    assert score.metrics["hallucination_rate_exact"] == pytest.approx(case["hallucination_rate"])
    # what the published script counts as 0 without a word is counted as unreadable too
    assert [i for i, item in enumerate(score.items) if item.unparsed] == [3, 4, 7]


@pytest.mark.parametrize(("protocol", "suffix"), [("", False), ("llava_mod", True)])
def test_mmhal_asks_for_short_answers_only_as_llava_mod(protocol, suffix, tmp_path):
    from benchmark_layouts import mmhal

    mmhal(tmp_path)
    task = get("mmhal")
    question = next(task.questions(task.source(tmp_path), task.protocol(protocol)))
    short = "\nAnswer the question using a single word or phrase."
    assert question.text == "What?" + (short if suffix else "")


def test_llava_mod_gqa_file(tmp_path):
    task, converted = get("gqa"), MOD["gqa_converted"]
    asked = [{"question_id": row["questionId"], "answer": "yes"} for row in converted]
    for change in (str, str.capitalize, lambda text: f"{text.upper()}.", lambda text: f"{text}.."):
        answers = [{"question_id": row["questionId"], "text": change(row["prediction"])} for row in converted]
        task.convert(task.pair(asked, answers), tmp_path / "out.json")
        assert json.loads((tmp_path / "out.json").read_text()) == converted
    # a question nobody answered: left out there, an empty and wrong prediction here
    task.convert(task.pair(asked, answers[1:]), tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == [{**converted[0], "prediction": ""}, *converted[1:]]
    score = task.score(asked, answers[1:])
    assert score.metrics["accuracy"] == 0
    assert [item.answered for item in score.items] == [False, True, True]


def test_mme_first_four_characters():
    from mmpipe.benchmarks.yes_no import first_four

    for reply, label in load("_llava_scorers")["mme_calculation"]["parse"].items():
        assert first_four(reply.rstrip("\n")) == label, reply


def test_scienceqa_result_file(tmp_path):
    vector = load("_llava_scorers")["sqa"]
    task = get("scienceqa")
    asked = task.parse_references(
        [Document("problems.json", vector["problems"]), Document("splits", {"test": list(vector["problems"])})]
    )
    task.convert(task.pair(asked, vector["predictions"]), tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == vector["output_result"]


SUBMISSIONS = {"vizwiz": lambda vector: vector["submission"], "vqav2": lambda vector: vector["submission"]}


@pytest.mark.parametrize("name", sorted(SUBMISSIONS))
def test_submission_list(name, tmp_path):
    vector, task = load(name), get(name)
    task.convert(task.pair(references(name, vector), vector["answers"]), tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == SUBMISSIONS[name](vector)


def test_mmbench_submission_sheet(tmp_path):
    from openpyxl import load_workbook

    vector, task = load("mmbench"), get("mmbench")
    task.convert(task.pair(references("mmbench", vector), vector["answers"]), tmp_path / "out.xlsx")
    header, *rows = load_workbook(tmp_path / "out.xlsx")["Sheet1"].iter_rows(values_only=True)
    assert list(header) == vector["expected"]["submission_columns"]
    assert [dict(zip(header, row, strict=True)) for row in rows] == [
        {**row, "prediction": row["prediction"] or None} for row in vector["expected"]["submission_rows"]
    ]


def test_mme_files_of_the_official_tool(tmp_path):
    from mmpipe.benchmarks.mme import eval_tool_files

    vector, task = load("mme"), get("mme")
    pairs = task.pair(references("mme", vector), vector["answers"])
    files = vector["expected"]["eval_tool_files"]
    assert eval_tool_files(pairs) == files
    task.convert(pairs, tmp_path / "answers")
    assert {path.stem: path.read_text() for path in (tmp_path / "answers").iterdir()} == files
    task.convert(pairs, tmp_path / "answers.zip")
    with zipfile.ZipFile(tmp_path / "answers.zip") as archive:
        assert {name.removesuffix(".txt"): archive.read(name).decode() for name in archive.namelist()} == files


def test_prompts():
    """The prompt layouts that lmms-eval and MMMU use, text for text."""
    from mmpipe.benchmarks import mathvista

    def ask(name: str, protocol: str, record: dict[str, Any]) -> str:
        task = get(name)
        return task.text({"question_id": 1, "index": 1, **record}, task.protocol(protocol))

    layouts = {"format-prompt": "format"}
    makers = {
        ("mathvista", ""): lambda doc, v: mathvista.prompt(doc, layouts.get(v, v)),
        ("mmmu", "mmmu_val"): lambda doc, v: ask("mmmu", "lmms", doc),
        ("mmmu", "official llava1.5 config"): lambda doc, v: ask("mmmu", "mmmu_val", doc),
        ("mmbench", ""): lambda doc, v: ask("mmbench", "lmms", doc),
        ("scienceqa", ""): lambda doc, v: ask("scienceqa", "lmms", doc),
        ("textvqa", ""): lambda doc, v: ask("textvqa", "lmms", doc) if v == "ocr=False" else None,
    }
    seen = 0
    for item in load("_prompts")["items"]:
        maker = makers.get((item["benchmark"], item["task"])) or makers.get((item["benchmark"], ""))
        text = maker(item["doc"], item["variant"]) if maker else None
        if text is not None:
            assert text == item["prompt"], item["benchmark"]
            seen += 1
    assert seen >= 24


def test_mathvista_output_file_of_the_official_scripts(tmp_path):
    vector, task = load("mathvista"), get("mathvista")
    task.convert(task.pair(references("mathvista", vector), vector["answers"]), tmp_path / "output.json")
    written = json.loads((tmp_path / "output.json").read_text())
    assert list(written) == [record["pid"] for record in vector["references"]]
    replies = {answer["question_id"]: answer["text"] for answer in vector["answers"]}
    for record in vector["references"]:
        assert written[record["pid"]] == {**record, "response": replies[record["pid"]]}
