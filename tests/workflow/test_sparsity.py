"""Sparsification as the rules see it: which jobs, and what a changed setting makes again."""

from __future__ import annotations

import shutil

from project_fixtures import REPOSITORY, Project


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
