"""The recipes of the published systems, planned to the last file without anything being fetched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from project_fixtures import REPOSITORY, Project


@pytest.fixture
def project(fresh: Project, tmp_path: Path) -> Project:
    """The project with its catalogues as they are, not shrunken."""
    copy = fresh.copy(tmp_path / "project")
    shutil.copytree(REPOSITORY / "config", copy.root / "config", dirs_exist_ok=True)
    return copy


def test_llava_15_fetches_every_shared_picture_once(project: Project) -> None:
    jobs = project.planned("results/mmbench.json", "--configfile", "config/llava-1.5.yaml")
    assert jobs["pretrain"] == jobs["finetune"] == jobs["compare"] == 1
    # pretrain; annotations, five sets of pictures and the two that join them; the benchmark
    assert jobs["fetch_dataset"] == 1 + (1 + 5 + 2) + 1
    assert jobs["fetch_backbone"] == 2
    assert jobs["mix_data"] == 2


def test_libmoe_trains_what_the_routers_share_once_for_each_backbone(project: Project) -> None:
    jobs = project.planned("results/mmbench.json", "--configfile", "config/libmoe.yaml")
    assert jobs["pretrain"] == jobs["prefinetune"] == 3
    assert jobs["upcycle"] == jobs["finetune"] == 15
    assert jobs["fetch_backbone"] == 2 + 2
    assert jobs["mix_data"] == 3


def test_libmoes_data_variants_share_the_upcycled_model(project: Project) -> None:
    def both(config: dict[str, Any]) -> None:
        config["recipes"] = ["libmoe-clip336-phi3-topk-*"]

    project.edit("config/libmoe.yaml", both)
    jobs = project.planned("results/mmbench.json", "--configfile", "config/libmoe.yaml")
    assert (jobs["pretrain"], jobs["prefinetune"], jobs["upcycle"], jobs["finetune"]) == (1, 1, 3, 6)


def test_the_demo_of_libmoe(project: Project) -> None:
    jobs = project.planned("results/pope.json", "--configfile", "config/demo-libmoe.yaml")
    assert (jobs["pretrain"], jobs["prefinetune"], jobs["upcycle"]) == (1, 1, 10)
    assert jobs["finetune"] == 1 + 10, "the demo's own, and one for each router and seed"
    plan = project.planned("results/mmbench.json")
    assert "prefinetune" not in plan, "not part of the default"


def test_llava_moss2_is_constructed_aligned_and_tuned(project: Project) -> None:
    jobs = project.planned("results/mmbench.json", "--configfile", "config/llava-moss2.yaml")
    assert jobs["construct"] == jobs["pretrain"] == jobs["finetune"] == jobs["compare"] == 1
    assert jobs["fetch_backbone"] == 2


def test_the_demo_of_moss2_is_made_on_the_spot(project: Project) -> None:
    jobs = project.planned("results/mmbench.json", "--configfile", "config/demo-moss2.yaml")
    assert jobs["construct"] == jobs["pretrain"] == jobs["finetune"] == 1
