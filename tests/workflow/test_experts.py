"""Logging experts: who asks for it gets file and figures; who does not pays nothing."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from mmpipe.errors import ConfigError
from mmpipe.plan.plan import Plan

GROWN = "extends: demo\nstages: {upcycle: {moe: {placement: dense}}}\n"
LATER = (
    "extends: grown\n"
    "stages: {tuned: {kind: finetune, data: shapes-finetune, max_steps: 2, batch_size: 8, template: chatml}}\n"
)


def choose(project: Any, **config: Any) -> None:
    (project.root / "config/recipes/grown.yaml").write_text(GROWN)
    (project.root / "config/recipes/later.yaml").write_text(LATER)
    project.edit("config/config.yaml", lambda c: c.update(config))


def plan_of(project: Any, **config: Any) -> Plan:
    choose(project, **config)
    content = yaml.safe_load((project.root / "config/config.yaml").read_text())
    return Plan(content, project.root)


def test_who_does_not_ask_plans_nothing_of_it(project: Any) -> None:
    choose(project, recipes=["demo", "grown"])
    jobs = project.planned("all")
    assert not [name for name in jobs if "expert" in name or "analyse" in name]
    assert jobs["answer_chunk"] == 2
    assert "answer_chunk_and_log" not in jobs


def test_the_log_comes_with_the_answers_and_the_dense_are_left_alone(project: Any) -> None:
    choose(project, recipes=["demo", "grown"], log_experts=True)
    jobs = project.planned("results/grown/eval/mmbench/experts/balance.svg", "results/mmbench.json")
    assert jobs == Counter(
        upcycle=1, answer_chunk_and_log=1, answer_chunk=1, gather_experts=1, analyse_answers=1,
        gather_answers=2, score_answers=2, compare=1,
    )  # fmt: skip


@pytest.mark.slow
def test_figures_and_tables_are_made(project: Any) -> None:
    choose(project, recipes=["grown@upcycle", "later"], log_experts={"layers": [1], "without_first": True})
    names = ("frequency", "balance", "coactivation", "confidence", "modality", "change", "similarity")
    eval_ = project.root / "results/later/eval/mmbench"
    project.snakemake(
        *(f"results/later/eval/mmbench/experts/{name}.svg" for name in names),
        *(f"results/later/experts/{name}.svg" for name in ("drift", "without_first")),
    )
    for name in names:
        assert (eval_ / f"experts/{name}.csv").read_text().count("\n") > 1, name
    log = pq.read_table(eval_ / "experts.parquet")
    assert set(log["layer"].to_pylist()) == {1}
    asked = [json.loads(line)["question_id"] for line in (eval_ / "answers.jsonl").read_text().splitlines()]
    assert set(log["question_id"].to_pylist()) == {str(name) for name in asked}
    assert (eval_.parent / "mmbench@without_first/score.json").exists()
    answers = (eval_ / "answers.jsonl").read_bytes()

    # neither asking for other layers nor asking no more changes an answer
    choose(project, log_experts={"layers": [0]})
    jobs = project.planned("results/later/eval/mmbench/experts/balance.svg")
    assert jobs == Counter(answer_chunk_and_log=1, gather_experts=1, analyse_answers=1)
    choose(project, log_experts=False)
    assert project.planned("results/later/eval/mmbench/score.json") == Counter()
    assert (eval_ / "answers.jsonl").read_bytes() == answers
    assert "compare" not in project.planned("results/later/eval/mmbench/score.json")


def test_checkpoints_and_benchmarks_can_be_chosen(project: Any) -> None:
    plan = plan_of(project, recipes=["demo", "grown", "later"], log_experts={"checkpoints": ["later"]})
    assert plan.expert_logs.checkpoints == ["later"]
    assert plan.expert_logs.benchmarks == ["mmbench"]  # a control is none
    figures = plan.expert_logs.figures()
    assert "results/later/eval/mmbench/experts/frequency.svg" in figures
    assert not [path for path in figures if "change" in path or "without_first" in path or "demo" in path]
    everything = plan_of(project, log_experts=True)
    assert everything.expert_logs.checkpoints == ["grown", "later"]
    assert "results/later/eval/mmbench/experts/change.svg" in everything.expert_logs.figures()
    assert "results/grown/eval/mmbench/experts/change.svg" not in everything.expert_logs.figures()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"checkpoints": ["latr"]}, "log_experts: checkpoints: 'latr' is not chosen; did you mean 'later'"),
        ({"benchmarks": ["pope"]}, "log_experts: benchmarks: 'pope' is not chosen"),
        ({"layer": [1]}, "unknown key 'log_experts.layer'; did you mean 'layers'"),
    ],
)
def test_mistakes_are_named(project: Any, wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        plan_of(project, recipes=["demo", "later"], log_experts=wanted)


def test_without_a_sparse_checkpoint_there_is_nothing_to_log(project: Any) -> None:
    with pytest.raises(ConfigError, match="none of the chosen recipes adds experts"):
        plan_of(project, recipes=["demo"], log_experts=True)


def test_layers_without_experts_are_named(project: Any) -> None:
    choose(project, recipes=["grown"], log_experts={"layers": [5]})
    result = project.snakemake("results/grown/eval/mmbench/experts.parquet", check=False)
    assert "layers: [5] have no experts; layers with experts: [0, 1]" in result.stdout
    assert "Traceback" not in result.stdout
