"""The recipes of the published systems, planned to the last file without anything being fetched."""

from __future__ import annotations

import shutil
from pathlib import Path

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
