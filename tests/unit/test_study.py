"""The study of the demo's student compares like with like."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml

from mmpipe.plan.plan import Plan

ROOT = Path(__file__).parents[2]
KEYS = ("data", "learning_rate", "max_steps", "batch_size", "adam_betas", "warmup_ratio", "seed")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan(yaml.safe_load((ROOT / "config/study-mod.yaml").read_text()), ROOT)


def test_every_row_is_three_seeds(plan):
    families = Counter(plan.family(checkpoint) for checkpoint in plan.chosen_recipes)
    assert set(families.values()) == {3}
    assert list(families) == [
        "study-sft-*",
        "study-mod-*@distill_dense",
        "study-dense-*",
        "study-mod-*@distill_sparse",
        "study-mod-*",
    ]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("one", "other"),
    [("study-sft-{seed}", "study-mod-{seed}@distill_dense"), ("study-dense-{seed}", "study-mod-{seed}@distill_sparse")],
)
def test_what_is_compared_saw_the_same_data_as_often(plan, one, other, seed):
    stages = [plan.checkpoint(name.format(seed=seed)) for name in (one, other)]
    settings = [{key: getattr(stage.settings, key) for key in KEYS} for stage in stages]
    assert settings[0] == settings[1]
    assert settings[0]["seed"] == seed


def test_dense_and_sparse_train_the_same_parts(plan):
    dense, sparse = (plan.checkpoint(name).settings for name in ("study-dense-1", "study-mod-1@distill_sparse"))
    assert (dense.trainable, dense.loss_type) == (sparse.trainable, sparse.loss_type)


def test_the_study_is_of_the_demos_own_student(plan):
    for name in ("distill_dense", "distill_sparse", "prefer"):
        ours, theirs = plan.stage("study-mod-1", name).settings, plan.stage("demo-mod", name).settings
        assert ours.spec() | {"seed": 0} == theirs.spec() | {"seed": 0}
    sft = plan.stage("study-sft-1", "finetune").settings
    assert sft.spec() | {"seed": 0} == plan.stage("demo-sft", "finetune").settings.spec() | {"seed": 0}
