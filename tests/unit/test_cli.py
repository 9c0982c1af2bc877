"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def mmpipe(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "mmpipe.cli.main", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_help_and_version():
    assert "plan" in mmpipe("--help").stdout
    assert mmpipe("--version").stdout.strip().count(".") == 2


def test_the_plan_of_the_demo():
    output = mmpipe("plan", "demo").stdout
    assert "pretrain" in output
    assert "results/demo/finetune/model" in output


def test_shared_stages_name_their_owner():
    assert "shared, made by demo-mod" in mmpipe("plan", "demo-sft").stdout


def test_an_unknown_recipe_is_one_line_and_status_1():
    result = mmpipe("plan", "dmo")
    assert result.returncode == 1
    assert "'dmo'" in result.stderr
    assert "did you mean 'demo'" in result.stderr
    assert "Traceback" not in result.stderr


def test_answers_are_scored_offline(tmp_path):
    rows = [
        {
            "index": 1 + rotation * 1_000_000,
            "question": "?",
            "A": "x",
            "B": "y",
            "answer": "AB"[rotation],
            "split": "dev",
        }
        for rotation in (0, 1)
    ]
    references, answers = tmp_path / "r.jsonl", tmp_path / "a.jsonl"
    references.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers.write_text("".join(json.dumps({"question_id": row["index"], "text": row["answer"]}) + "\n" for row in rows))
    result = mmpipe("score", "mmbench", "--references", str(references), "--answers", str(answers))
    assert result.returncode == 0, result.stderr
    score = json.loads(result.stdout)
    assert (score["benchmark"], score["n"], score["missing"]) == ("mmbench", 2, 0)
    assert score["headline"]["value"] == 1


def test_the_error_for_a_missing_comparison_names_the_command(tmp_path):
    result = mmpipe("show", str(tmp_path / "mmbench.json"))
    assert result.returncode == 1
    assert "snakemake" in result.stderr


def test_a_comparison_is_a_table(tmp_path):
    row = {"checkpoint": "demo", "score": 0.9, "ci95": [0.8, 1.0], "units": 10, "control": False}
    content = {"title": "MMBench", "benchmark": "mmbench", "protocol": "circular", "metric": "overall", "rows": [row]}
    (tmp_path / "mmbench.json").write_text(json.dumps(content))
    output = mmpipe("show", str(tmp_path / "mmbench.json")).stdout
    assert "demo" in output
    assert "0.900" in output


def test_starting_imports_nothing_it_does_not_use():
    code = "import sys; import mmpipe.cli.main; print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
