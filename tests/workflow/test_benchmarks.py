"""Every benchmark through the workflow: made files of the official form, a tiny model, one run for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_layouts import LAYOUTS, VERDICTS
from judge_server import running
from project_fixtures import Project

from mmpipe.benchmarks.base import get

SERVER_ONLY = {"mmvet"}


@pytest.fixture
def everything(project: Project, tmp_path: Path) -> Project:
    """The finished demo, with every benchmark chosen on made files; its model is not trained again."""

    def add_data(catalogue: dict[str, Any]) -> None:
        for name, (make, _) in LAYOUTS.items():
            folder = tmp_path / "official" / name
            folder.mkdir(parents=True)
            make(folder)
            catalogue[f"made-{name}"] = {"source": "path", "path": str(folder)}

    def choose(config: dict[str, Any]) -> None:
        names = sorted(LAYOUTS)
        config["benchmarks"] = [{name: {"data": f"made-{name}", "chunks": 1, "max_new_tokens": 3}} for name in names]
        for entry in config["benchmarks"]:
            if "vizwiz" in entry:
                entry["vizwiz"]["files"] = {}
            if "gqa" in entry:
                entry["gqa"]["chunks"] = 2  # one of them is empty

    project.edit("config/datasets.yaml", add_data)
    project.edit("config/config.yaml", choose)
    return project


@pytest.fixture
def judge():
    with running() as server:
        server.reply = VERDICTS["mmhal"]
        yield server


def with_judge(project: Project, url: str) -> None:
    def add(config: dict[str, Any]) -> None:
        for entry in config["benchmarks"]:
            if "mmhal" in entry:
                entry["mmhal"]["judge"] = {"base_url": url, "model": "judge-1"}

    project.edit("config/config.yaml", add)


def test_a_judged_benchmark_without_judge_is_found_before_any_job(everything):
    result = everything.snakemake("-n", "scores", check=False)
    assert result.returncode != 0
    assert "the protocol 'mmhal' needs a judge model" in result.stdout


@pytest.mark.slow
def test_every_benchmark_runs(everything, judge):
    with_judge(everything, judge.url)
    scored = [name for name in sorted(LAYOUTS) if name not in SERVER_ONLY]
    results = [f"results/{name}.json" for name in scored]
    everything.snakemake(*results, "scores", "submissions", "answers")
    for name in scored:
        comparison = json.loads((everything.root / f"results/{name}.json").read_text())
        assert [row["checkpoint"] for row in comparison["rows"]] == ["demo"], name
        assert comparison["rows"][0]["missing"] == 0
        assert comparison["n"] == len(
            (everything.root / f"resources/benchmarks/{name}/questions.jsonl").read_text().splitlines()
        )
    for name in LAYOUTS:
        answers = (everything.root / f"results/demo/eval/{name}/answers.jsonl").read_text().splitlines()
        assert answers, name
        submission = everything.root / f"results/demo/submit/{name}.{get(name).submission}"
        assert submission.stat().st_size > 0, name
    assert len(judge.seen) == 8
    assert not everything.planned(*results, "scores", "submissions", "answers")
