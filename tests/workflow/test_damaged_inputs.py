"""Jobs end with the name of a damaged file, before they make anything of it."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
from project_fixtures import Project

from mmpipe.jobs import mock_snakemake

ANSWERED = {"checkpoint": "demo", "benchmark": "mmbench"}
TOKENS = "resources/tokens/shapes-finetune/*"
JOBS = [
    ("answer", "answer_chunk", {**ANSWERED, "chunk": "0000-of-0001"}, "results/demo/finetune/model/model.safetensors"),
    ("answer", "answer_chunk", {**ANSWERED, "chunk": "0000-of-0001"}, "resources/benchmarks/mmbench/images/*"),
    ("score", "score_answers", ANSWERED, "resources/benchmarks/mmbench/references.jsonl"),
    (
        "convert",
        "convert_submission",
        {**ANSWERED, "extension": "xlsx"},
        "resources/benchmarks/mmbench/references.jsonl",
    ),
    ("gather", "gather_answers", ANSWERED, "resources/benchmarks/mmbench/questions.jsonl"),
    ("show", "show_samples", ANSWERED, "resources/benchmarks/mmbench/images/*"),
    ("stage", "finetune", {"recipe": "demo", "stage": "finetune"}, f"{TOKENS}/shards/*.arrow"),
    ("stage", "finetune", {"recipe": "demo", "stage": "finetune"}, "results/demo/pretrain/model/projector.safetensors"),
    ("mix", "mix_data", {"mixture": "shapes-finetune"}, "resources/datasets/shapes-conversations/*.json"),
    ("prepare_benchmark", "prepare_benchmark", {"benchmark": "mmbench"}, "resources/datasets/shapes-mmbench/*.tsv"),
    ("tokenise", "tokenise", {"mixture": "shapes-finetune"}, "resources/mixtures/shapes-finetune/records.arrow"),
    ("tokenise", "tokenise", {"mixture": "shapes-finetune"}, "resources/backbones/qwen2-tiny/tokenizer.json"),
    ("check_contamination", "check_contamination", {"mixture": "shapes-finetune"}, "resources/mixtures/*/images.arrow"),
]


@pytest.mark.parametrize(("script", "rule", "wildcards", "pattern"), JOBS)
def test_a_job_ends_with_the_name_of_a_damaged_file(
    finished: Project,
    script: str,
    rule: str,
    wildcards: dict[str, str],
    pattern: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(finished.root)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    mocked = mock_snakemake(rule, **named(finished.root, wildcards, rule))
    path = next(path for path in sorted(Path().glob(pattern)) if path.name != "manifest.json")
    content = path.read_bytes()
    at = len(content) // 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    try:
        with pytest.raises(SystemExit):
            import_module(f"workflow.scripts.{script}").main(mocked)
    finally:
        path.write_bytes(content)
    assert f"mmpipe: {path}: damaged or changed" in capsys.readouterr().err


def named(root: Path, wildcards: dict[str, str], rule: str) -> dict[str, str]:
    if rule != "tokenise":
        return wildcards
    key = next((root / "resources/tokens" / wildcards["mixture"]).iterdir()).name
    return {**wildcards, "key": key}
