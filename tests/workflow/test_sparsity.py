"""Sparsification as the rules see it: which jobs, and what a changed setting makes again."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import yaml
from project_fixtures import REPOSITORY, Project

from mmpipe.plan.plan import Plan


def jobs(project: Project, *targets: str, config: str = "demo-dynamic") -> dict[str, int]:
    return project.planned(*targets, "--configfile", f"config/{config}.yaml")


def test_one_training_many_keep_rates(fresh: Project) -> None:
    planned = jobs(fresh, "results/mmbench.json")
    assert planned["sparsify"] == planned["pretrain"] == planned["finetune"] == 1
    # the dense model, the sparsified one, and two other rates
    assert planned["answer_chunk"] == planned["score_answers"] == 4
    assert fresh.planned("results/demo-dynamic+whole/eval/mmbench/score.json")["answer_chunk"] == 1


def test_settings_of_predictors_train_the_predictors_alone(finished: Project, tmp_path) -> None:
    project = finished.copy(tmp_path / "project")
    planned = jobs(project, "results/demo-dynamic/sparsify/model/manifest.json")
    assert planned == {"sparsify": 1}, "what the demo has made is shared"


def test_the_published_recipe(fresh: Project, tmp_path) -> None:
    project = fresh.copy(tmp_path / "project")
    shutil.copytree(REPOSITORY / "config", project.root / "config", dirs_exist_ok=True)
    planned = jobs(project, "results/dynamic-llava-7b/eval/gqa/score.json", config="dynamic-llava")
    assert planned["construct"] == planned["sparsify"] == planned["fetch_backbone"] == 1
    assert planned["answer_chunk"] == 8, "chunks as many as GPUs"


def test_what_is_saved_and_kept_is_shown_of_sparsified_checkpoints_alone(fresh: Project) -> None:
    def plan(**config: Any) -> Plan:
        content = yaml.safe_load((fresh.root / "config/demo-dynamic.yaml").read_text())
        return Plan(content | config, fresh.root)

    shown = [
        f"results/demo-dynamic/{file}"
        for file in ("efficiency/table.html", "efficiency/figure.svg", "eval/mmbench/kept.html")
    ]
    assert [item for item in plan().report_items() if "efficiency" in item or "kept" in item] == shown
    variants = plan(recipes=["demo-dynamic+whole", "demo-dynamic+keep0.3"], keep_rates=[])
    assert set(shown) < set(variants.report_items()), "whatever the variant"
    assert not plan(recipes=["demo"]).efficiency.report_items()
    other = plan(benchmarks=["mmbench_shuffled", "pope"])
    assert other.efficiency.benchmark == "pope", "the first that is no control"

    planned = jobs(fresh, *shown)
    assert planned["measure_efficiency"] == planned["show_efficiency"] == planned["map_retention"] == 1
    assert not planned["answer_chunk"]
    assert not {"measure_efficiency", "map_retention"} & set(jobs(fresh, "results/mmbench.json", "submissions"))


@pytest.mark.slow
def test_savings_and_maps_of_the_demo(fresh: Project, tmp_path) -> None:
    project = fresh.copy(tmp_path / "project")

    def small(recipe: dict[str, Any]) -> None:
        recipe["stages"]["sparsify"] |= {"max_steps": 2, "batch_size": 8}
        recipe["stages"]["sparsify"]["sparsity"]["sparse_layer"] = 1

    project.edit("config/recipes/demo-dynamic.yaml", small)
    out = project.root / "results/demo-dynamic"
    targets = [f"results/demo-dynamic/{file}" for file in ("efficiency/table.html", "eval/mmbench/kept.html")]
    config = ("--configfile", "config/demo-dynamic.yaml")
    project.snakemake(*targets, *config)
    assert "no gain" in (out / "efficiency/table.html").read_text()
    measured = json.loads((out / "efficiency/measured.json").read_text())
    assert measured["benchmark"] == "mmbench"
    at = {(row["batch"], row["keep"], row["measure"]): row["value"] for row in measured["rows"]}
    for batch in (1, 16):
        for keep in (None, 0.2, 0.5, 1.0):
            assert at[batch, keep, "cache_bytes"] == at[batch, keep, "predicted_cache_bytes"]
    (first, *_) = json.loads((out / "eval/mmbench/kept.json").read_text())
    assert {rate: kept.count("1") for rate, kept in first["kept"].items()} == {"0.2": 1, "0.5": 4}
    assert not project.planned(*targets, *config)

    # other rates: the pages alone
    project.edit("config/demo-dynamic.yaml", lambda c: c.update(keep_rates=[0.4]))
    planned = project.planned(*targets, *config)
    assert planned == {"measure_efficiency": 1, "show_efficiency": 1, "map_retention": 1}
