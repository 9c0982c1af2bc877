"""The recipes of the published systems, planned to the last file without anything being fetched."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from project_fixtures import REPOSITORY, Project

from mmpipe.plan.plan import Plan
from mmpipe.stages.base import Stage


@pytest.fixture
def project(fresh: Project, tmp_path: Path) -> Project:
    """The project with its catalogues as they are, not shrunken."""
    copy = fresh.copy(tmp_path / "project")
    shutil.copytree(REPOSITORY / "config", copy.root / "config", dirs_exist_ok=True)
    return copy


def test_llava_15_fetches_every_shared_image_once(project: Project) -> None:
    jobs = project.planned("results/mmbench.json", "--configfile", "config/llava-1.5.yaml")
    assert jobs["pretrain"] == jobs["finetune"] == jobs["compare"] == 1
    # pretrain; annotations, five sets of images and the two that join them; the benchmark
    assert jobs["fetch_dataset"] == 1 + (1 + 5 + 2) + 1
    assert jobs["fetch_backbone"] == 2
    assert jobs["mix_data"] == 2


def test_llava_mod_trains_a_teacher_a_family_and_shares_the_students_stages(project: Project) -> None:
    jobs = project.planned("results/mmbench.json", "--configfile", "config/llava-mod.yaml")
    assert jobs["compare"] == 1
    # two teachers and four students; the stages of a student that are compared are those of its path
    assert (jobs["pretrain"], jobs["finetune"]) == (2 + 4, 2)
    assert jobs["distill_dense"] == jobs["upcycle"] == jobs["distill_sparse"] == jobs["prefer"] == 4
    # the log-probabilities of a family's teacher serve both of its students
    assert jobs["precompute"] == 2
    assert jobs["fetch_backbone"] == 1 + 2 + 4
    # captions with the mark in front (teachers) and in place (students), LLaVA's 665K, and the three of the distillation
    assert jobs["mix_data"] == 6


def test_libmoe_trains_what_the_routers_share_once_for_each_backbone(project: Project) -> None:
    jobs = project.planned("results/mmbench.json", "--configfile", "config/libmoe.yaml")
    assert jobs["pretrain"] == jobs["prefinetune"] == 3
    assert jobs["upcycle"] == jobs["finetune"] == 15
    assert jobs["fetch_backbone"] == 2 + 2
    assert jobs["mix_data"] == 3


def stages(*recipes: str) -> Counter[str]:
    """How many stages of each kind the chosen recipes need."""
    plan = Plan({"recipes": list(recipes), "benchmarks": ["pope"]}, REPOSITORY)
    return Counter(stage.kind for stage in plan.chosen_stages())


def test_libmoes_data_variants_share_the_upcycled_model() -> None:
    assert stages("libmoe-clip336-phi3-topk-*") == {"pretrain": 1, "prefinetune": 1, "upcycle": 3, "finetune": 6}


def test_dynamic_llava_trains_with_the_published_global_batch() -> None:
    plan = Plan({"recipes": ["dynamic-llava-*"], "benchmarks": ["pope"]}, REPOSITORY)
    published = {"dynamic-llava-7b": 8 * 1 * 8, "dynamic-llava-13b": 4 * 2 * 8}  # a device, accumulated, devices
    assert {name: plan.checkpoint(name).settings.batch_size for name in plan.chosen_recipes} == published


def test_llava_mod_as_its_code_computes_is_the_same_path_with_switches() -> None:
    plan = Plan({"recipes": ["llava-mod-reference-*"], "benchmarks": ["pope"]}, REPOSITORY)
    ours, theirs = (plan.stages(f"llava-mod-{name}-1.5b") for name in ("qwen2", "reference"))
    assert ours[0] is theirs[0], "the projector is shared"
    for fixed, published in zip(ours[1:], theirs[1:], strict=True):
        assert _without_switches(published.settings) == _without_switches(fixed.settings)
        assert published.settings.spec() != fixed.settings.spec()
        assert published.settings.hardware.deepspeed == fixed.settings.hardware.deepspeed
    (upcycled,) = (stage.settings.of_parts() for stage in theirs if stage.kind == "upcycle")
    assert upcycled["language_model"].router_options == {"second_choice": "gumbel"}


def _without_switches(settings: Stage) -> dict[str, Any]:
    spec = settings.spec()
    moe = {key: value for key, value in spec.get("moe", {}).items() if key != "compat"}
    kept = {key: value for key, value in spec.items() if key not in ("compat", "router_options")}
    return kept | ({"moe": moe} if moe else {})


def test_the_demo_of_libmoe_grows_from_the_demo() -> None:
    expected = {"pretrain": 1, "prefinetune": 1, "upcycle": 10, "finetune": 1 + 10}
    assert stages("demo-libmoe-*") == stages("demo", "demo-libmoe-*") == expected
    default = yaml.safe_load((REPOSITORY / "config/config.yaml").read_text())
    assert "prefinetune" not in stages(*default["recipes"])


def test_llava_moss2_is_constructed_aligned_and_tuned(project: Project) -> None:
    jobs = project.planned("results/mmbench.json", "--configfile", "config/llava-moss2.yaml")
    assert jobs["construct"] == jobs["pretrain"] == jobs["finetune"] == jobs["compare"] == 1
    assert jobs["fetch_backbone"] == 2


def test_the_demo_of_moss2_is_made_on_the_spot(project: Project) -> None:
    jobs = project.planned("results/mmbench.json", "--configfile", "config/demo-moss2.yaml")
    assert jobs["construct"] == jobs["pretrain"] == jobs["finetune"] == 1
