"""Every stage that trains has an objective, found by its name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mmpipe.stages import stage_kinds
from mmpipe.stages.base import TrainStage
from mmpipe.training.objectives import objective_class

EXPECTED = {
    "distill_dense": "Distillation",
    "distill_sparse": "Distillation",
    "finetune": "LanguageModelling",
    "prefer": "Preference",
    "prefinetune": "LanguageModelling",
    "pretrain": "LanguageModelling",
    "sparsify": "Sparsification",
}


def test_every_training_stage_is_listed():
    assert sorted(EXPECTED) == sorted(name for name, kind in stage_kinds().items() if issubclass(kind, TrainStage))


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_stage_has_the_objective_of_its_own_name_or_of_its_base(kind):
    assert objective_class(stage_kinds()[kind].model_construct()).__name__ == EXPECTED[kind]


def test_settings_of_stages_are_read_without_torch():
    code = "import sys; from mmpipe.stages import stage_kinds; stage_kinds(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
