"""`mmpipe score` and `mmpipe convert` on every benchmark's official files, typed as a stranger types them."""

from __future__ import annotations

import json
import zipfile
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
from benchmark_layouts import LAYOUTS, VERDICTS

from mmpipe.benchmarks.base import get, names
from mmpipe.cli.main import main

# benchmark -> the official files of its references, and the names its official scorer gives its figures
OFFICIAL: dict[str, tuple[list[str], list[str]]] = {
    "ai2d": (["data"], ["exact_match"]),
    "chartqa": (
        ["test_human.json", "test_augmented.json"],
        ["relaxed_overall", "relaxed_human_split", "relaxed_augmented_split"],
    ),
    "gqa": (["testdev_balanced_questions.json"], ["accuracy", "binary", "open", "distribution"]),
    "hallusionbench": (["HallusionBench.json"], ["aAcc", "qAcc", "fAcc"]),
    "mathvista": (["testmini.json"], ["accuracy", "correct", "total", "question_type", "skills"]),
    "mmbench": (["mmbench_dev_en_20231003.tsv"], ["overall", "category", "l2_category", "report_acc"]),
    "mme": (["MME_Benchmark_release_version"], ["perception", "cognition", "per_category"]),
    "mmhal": (["mmhal-bench_with_image.jsonl"], ["average_score", "hallucination_rate", "per_question_type"]),
    "mmmu": (["."], ["overall", "per_subject", "per_domain", "random_fallbacks"]),
    "mmstar": (["mmstar.parquet"], ["official_final_score_over_1500", "official_category_over_250", "per_l2"]),
    "objhal": (
        ["obj_halbench_300_with_image.jsonl", "synonyms_refine.txt", "annotations"],
        ["CHAIRs_refine", "CHAIRi", "response_hallucination_rate_percent", "object_recall"],
    ),
    "pope": (
        [f"coco/coco_pope_{category}.json" for category in ("adversarial", "popular", "random")],
        ["adversarial", "popular", "random", "mean_f1"],
    ),
    "scienceqa": (["problems.json", "pid_splits.json"], ["accuracy", "img_accuracy", "correct", "count", "img_count"]),
    "seed": (["SEED-Bench.json"], ["accuracy", "image_accuracy", "per_type"]),
    "textvqa": (["TextVQA_0.5.1_val.json"], ["accuracy", "samples"]),
    "vizwiz": (["val.json"], ["overall", "unanswerability"]),
    "vqav2": (
        ["v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"],
        ["overall", "perAnswerType", "perQuestionType"],
    ),
}
NASTY = ["", "\x00", "é\u2028\u0661\u0662 ４２", "x" * 100_000, "=cmd|' /C calc'!A0", "\ud800", "\t\r\n", "(" * 3000]


class Stranger:
    """A benchmark's official files in a folder, and the command line."""

    def __init__(self, name: str, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
        self.name, self.root, self.capsys, self.monkeypatch = name, root, capsys, monkeypatch
        self.right = LAYOUTS[name][0](root)
        task = get(name)
        source = task.source(root)
        self.questions = list(task.questions(source, task.protocol()))
        self.references = [root / file for file in OFFICIAL[name][0]]
        self.answers = root / "my answers.jsonl"
        self.judge = root / "judge.jsonl"
        self.write(self.right)
        if name in VERDICTS:
            replies = [{"question_id": q.id, "reply": VERDICTS[name]} for q in self.questions]
            self.judge.write_text("".join(json.dumps(r) + "\n" for r in replies))

    def write(self, texts: list[str], ids: Any = lambda i: i, mark: bytes = b"", end: str = "\n") -> None:
        records = [
            {**q.extra, "question_id": ids(q.id), "prompt": q.text if q.prompt is None else q.prompt, "text": text}
            for q, text in zip(self.questions, texts, strict=False)
        ]
        self.answers.write_bytes(mark + end.join(json.dumps(r) for r in records).encode() + end.encode())

    def types(self, *arguments: Any) -> tuple[int, str, str]:
        """Status, output and errors of ``mmpipe`` with these arguments."""
        self.monkeypatch.setattr("sys.argv", ["mmpipe", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = self.capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    def score(self, *more: Any, references: list[Path] | None = None) -> dict[str, Any]:
        status, out, err = self.types("score", *self._arguments(references), *more)
        assert status == 0, err
        return json.loads(out)

    def fails(self, *more: Any) -> str:
        status, out, err = self.types("score", *self._arguments(None), *more)
        assert (status, out) == (1, "")
        assert "Traceback" not in err
        return err

    def _arguments(self, references: list[Path] | None) -> list[Any]:
        files = [part for path in references or self.references for part in ("--references", path)]
        judge = ["--judge", self.judge] if self.judge.exists() else []
        return [self.name, *files, "--answers", self.answers, *judge]


@pytest.fixture(params=sorted(OFFICIAL))
def stranger(request, tmp_path, capsys, monkeypatch) -> Stranger:
    return Stranger(request.param, tmp_path, capsys, monkeypatch)


def test_every_benchmark_with_a_score_is_here():
    assert sorted([*OFFICIAL, "mmvet"]) == names()


def test_official_files_are_scored_and_submitted(stranger):
    result = stranger.score("--per-item", stranger.root / "i.jsonl", "--out", stranger.root / "s.json")
    n = len(stranger.questions)
    assert {"benchmark", "protocol", "n", "metrics", "missing", "unparsed", "duplicates"} <= set(result)
    assert (result["benchmark"], result["n"]) == (stranger.name, n)
    assert (result["missing"], result["unparsed"], result["duplicates"]) == (0, 0, 0)
    assert set(OFFICIAL[stranger.name][1]) <= set(result["metrics"])
    assert json.loads((stranger.root / "s.json").read_text()) == result
    items = [json.loads(line) for line in (stranger.root / "i.jsonl").read_text().splitlines()]
    assert len(items) == n
    low, high = result["headline"]["ci95"]
    assert low <= result["headline"]["value"] <= high

    out = stranger.root / f"out/submission.{get(stranger.name).submission}"
    files = [part for path in stranger.references for part in ("--references", path)]
    status, printed, err = stranger.types("convert", stranger.name, *files, "--answers", stranger.answers, "--out", out)
    assert status == 0, err
    assert json.loads(printed)["missing"] == (stranger.name == "seed")  # whose video question is not asked
    content = out.read_bytes()
    assert content
    if out.suffix in (".json", ".jsonl"):
        for line in content.decode().splitlines() if out.suffix == ".jsonl" else [content.decode()]:
            json.loads(line)
    else:
        assert zipfile.is_zipfile(out)


def test_references_as_json_lines_give_the_same(stranger):
    task = get(stranger.name)
    path = stranger.root / "records.jsonl"
    records = task.read_references(stranger.references)
    path.write_text("".join(json.dumps(record, default=str) + "\n" for record in records))
    assert stranger.score(references=[path])["metrics"] == stranger.score()["metrics"]


def test_marks_line_ends_order_and_spelling_of_ids_do_not_matter(stranger):
    plain = stranger.score()
    stranger.write(stranger.right, ids=lambda i: f" {i} ", mark=b"\xef\xbb\xbf", end="\r\n\r\n")
    assert stranger.score()["metrics"] == plain["metrics"]
    lines = stranger.answers.read_bytes().splitlines()
    lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
    stranger.answers.write_bytes(b"\n".join(reversed(lines)))
    assert stranger.score()["metrics"] == plain["metrics"]


def test_no_reply_breaks_a_scorer(stranger):
    """Whatever a model says is scored by every protocol and submitted; nothing of it is a formula."""
    count = len(stranger.questions)
    for start in range(0, len(NASTY), count):
        stranger.write(list(islice(cycle(NASTY[start:] + NASTY), count)))
        for protocol in get(stranger.name).protocols:
            if not protocol.judged or stranger.judge.exists():
                assert stranger.score("--protocol", protocol.name)["missing"] == 0
        out = stranger.root / f"submission.{get(stranger.name).submission}"
        files = [part for path in stranger.references for part in ("--references", path)]
        status, _, err = stranger.types("convert", stranger.name, *files, "--answers", stranger.answers, "--out", out)
        assert status == 0, err


def test_missing_answers_are_wrong_and_counted(stranger):
    stranger.answers.write_text("")
    if stranger.judge.exists():
        stranger.judge.unlink()
    protocol = next(p.name for p in get(stranger.name).protocols if not p.judged) if stranger.name != "mmhal" else ""
    if not protocol:
        stranger.judge.write_text("")
    result = stranger.score("--protocol", protocol)
    assert result["missing"] == result["n"] == len(stranger.questions)
    assert result["unparsed"] == 0


def test_twice_unknown_and_of_another_split(stranger):
    line = stranger.answers.read_text().splitlines(keepends=True)[0]
    stranger.answers.write_text(line + line)
    assert "more than one answer to" in stranger.fails()
    stranger.answers.write_text(line + json.dumps({**json.loads(line), "question_id": "none-1"}) + "\n")
    assert "do not exist: none-1" in stranger.fails()
    stranger.answers.write_text(json.dumps({**json.loads(line), "question_id": "none-1"}) + "\n")
    assert "another split" in stranger.fails()


def test_what_is_wrong_is_one_line(stranger):
    assert "there is no protocol" in stranger.fails("--protocol", "nonsense")
    stranger.references = [stranger.root / "none.json"]
    assert "no such file" in stranger.fails()


def object_with_both(stranger: Stranger) -> dict[str, Any]:
    def load(name: str) -> Any:
        return json.loads((stranger.root / name).read_text())

    def load_lines(name: str) -> Any:
        return [json.loads(line) for line in (stranger.root / name).read_text().splitlines()]

    if stranger.name == "vqav2":
        first, second = (load(name) for name in OFFICIAL["vqav2"][0])
        return {"questions": first["questions"], "annotations": second["annotations"]}
    if stranger.name == "scienceqa":
        return {"problems": load("problems.json"), "pid_splits": load("pid_splits.json")}
    if stranger.name == "pope":
        categories = ("adversarial", "popular", "random")
        return {category: load_lines(f"coco/coco_pope_{category}.json") for category in categories}
    return {"questions": load(OFFICIAL[stranger.name][0][0])}


@pytest.mark.parametrize("name", ["gqa", "pope", "scienceqa", "vqav2"])
def test_one_object_may_hold_all_references(name, tmp_path, capsys, monkeypatch):
    stranger = Stranger(name, tmp_path, capsys, monkeypatch)
    path = tmp_path / "all.json"
    path.write_text(json.dumps(object_with_both(stranger)), encoding="utf-8-sig")
    assert stranger.score(references=[path])["metrics"] == stranger.score()["metrics"]
    assert stranger.score(references=[path])["n"] == len(stranger.questions)


def test_llavas_question_file_may_stand_beside_popes_labels(tmp_path, capsys, monkeypatch):
    from benchmark_layouts import pope_llava

    stranger = Stranger("pope", tmp_path, capsys, monkeypatch)
    pope_llava(tmp_path)
    plain = stranger.score()
    asked = [tmp_path / "llava_pope_test.jsonl", *stranger.references]
    assert stranger.score(references=asked)["metrics"] == plain["metrics"]


@pytest.mark.parametrize(
    ("name", "protocols"),
    [
        ("ai2d", "lmms libmoe llava vlmevalkit"),
        ("chartqa", "lmms libmoe llava vlmevalkit qwen"),
        ("gqa", "lmms libmoe llava vlmevalkit"),
        ("hallusionbench", "lmms libmoe intern vlmevalkit"),
        ("mathvista", "lmms libmoe vlmevalkit"),
        ("mmbench", "lmms libmoe llava vlmevalkit vanilla"),
        ("mme", "lmms libmoe llava vlmevalkit"),
        ("mmhal", "rlaifv llava_mod"),
        ("mmmu", "lmms libmoe llava norandom"),
        ("mmstar", "lmms libmoe llava"),
        ("objhal", "rlaifv llava_mod greedy chair"),
        ("pope", "lmms libmoe llava vlmevalkit"),
        ("scienceqa", "lmms libmoe llava"),
        ("textvqa", "lmms libmoe llava vlmevalkit textvqa_val textvqa_val_ocr"),
        ("vizwiz", "lmms llava m4c raw"),
        ("vqav2", "lmms llava raw vqav2_val"),
    ],
)
def test_the_variants_have_the_names_of_the_systems(name, protocols, tmp_path, capsys, monkeypatch):
    stranger = Stranger(name, tmp_path, capsys, monkeypatch)
    for protocol in protocols.split():
        result = stranger.score("--protocol", protocol)
        assert result["protocol"] == get(name).protocol(protocol).name
