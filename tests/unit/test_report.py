"""What the report draws and lays out."""

from __future__ import annotations

import json

from mmpipe.report.figures import draw_history
from mmpipe.report.pages import samples_page, table_page


def test_answers_of_models_are_escaped(tmp_path):
    evil = "<script>alert('x')</script>"
    prepared = tmp_path / "resources/benchmarks/mmbench"
    answers = tmp_path / "results/demo/eval/mmbench/answers.jsonl"
    prepared.mkdir(parents=True)
    answers.parent.mkdir(parents=True)
    (prepared / "questions.jsonl").write_text(json.dumps({"question_id": 1, "images": [], "text": evil}) + "\n")
    answers.write_text(json.dumps({"question_id": 1, "prompt": evil, "text": evil}) + "\n")
    verdict = {"question_id": 1, "correct": False, "parsed": evil, "gold": evil}
    (answers.parent / "per_item.jsonl").write_text(json.dumps(verdict) + "\n")
    page = tmp_path / "samples.html"
    samples_page(prepared, answers, answers.parent / "per_item.jsonl", page)
    assert "<script>" not in page.read_text()
    assert "&lt;script&gt;" in page.read_text()


def test_the_same_history_draws_the_same_bytes(tmp_path):
    rows = [{"step": s, "loss": 1 / s, "learning_rate": 0.1, "grad_norm": 1.0, "kl": 0.5, "lm": 0.5} for s in (1, 2)]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.svg", "b.svg"):
        draw_history(tmp_path / "history.jsonl", tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_means_over_seeds_stand_above_the_checkpoints(tmp_path):
    score = {"score": 0.5, "ci95": [0.4, 0.6], "units": 9, "missing": 0, "unparsed": 0, "control": False}
    made = {"lineage": {"checkpoint": {"path": "p", "sha256": "0" * 64}}}
    comparison = {
        "title": "T", "task": "t", "protocol": "p", "metric": "f1", "best": "a-1",
        "rows": [{"checkpoint": f"a-{seed}", **score, **made} for seed in (1, 2)],
        "seeds": [{"checkpoint": "a-*", "score": 0.5, "sd": 0.125, "low": 0.4, "high": 0.6, "seeds": 2, "control": False}],
    }  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps(comparison))
    table_page("comparison", tmp_path / "t.json", tmp_path / "t.html")
    page = (tmp_path / "t.html").read_text()
    assert page.index("0.500 ± 0.125") < page.index("a-1")
    (tmp_path / "t.json").write_text(json.dumps(comparison | {"seeds": []}))
    table_page("comparison", tmp_path / "t.json", tmp_path / "t.html")
    assert "±" not in (tmp_path / "t.html").read_text()
