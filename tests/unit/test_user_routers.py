"""The example of docs/routers.md, taken from the page and run; schedules that the trainer drives."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mmpipe.artifacts.files import read_jsonl
from mmpipe.checkpoints.load import open_checkpoint
from mmpipe.errors import ConfigError
from mmpipe.models.moe.collect import moe_layers
from mmpipe.stages.finetune import Finetune
from mmpipe.stages.upcycle import Upcycle
from mmpipe.training.run import run_stage

PAGE = (Path(__file__).parents[2] / "docs" / "routers.md").read_text()
SECTION = PAGE.partition("## A router of your own")[2]
COMMON = {"data": "mix", "template": "qwen", "batch_size": 4, "learning_rate": 1e-3}


def block(language: str) -> str:
    """The first code block of a language in the section."""
    found = re.search(rf"```{language}\n(.*?)```", SECTION, re.S)
    assert found
    return found[1]


@pytest.fixture
def my_router(demo_files: Path, monkeypatch: pytest.MonkeyPatch):
    """The example's file in the working directory of a user."""
    path = demo_files / "my_router.py"
    path.write_text(block("python"))
    importlib.invalidate_caches()
    monkeypatch.chdir(demo_files)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(demo_files)])
    yield path
    path.unlink()
    sys.modules.pop("my_router", None)


def test_the_example_is_as_short_as_promised():
    code = [line for line in block("python").splitlines() if line.strip()]
    assert len(code) <= 20


def test_the_example_of_the_documentation_trains(my_router: Path, job):
    run_stage(Finetune(**COMMON, max_steps=1), dense := job("dense"))
    settings = yaml.safe_load(block("yaml"))
    stage = Upcycle(**settings, parts={"vision_tower": {"placement": "dense"}, "language_model": {}})
    run_stage(stage, sparse := job("sparse", parent=dense.model_dir))
    run_stage(Finetune(**COMMON, max_steps=3), tuned := job("tuned", parent=sparse.model_dir))

    model, _, _ = open_checkpoint(tuned.model_dir)
    routers = [layer.router for layer in moe_layers(model).values()]
    assert {type(router).__name__ for router in routers} == {"Sharpened"}
    assert [router.scheduled(1.0, 4.0) for router in routers] == [4.0, 4.0], "evaluation takes the last value"
    history = read_jsonl(tuned.report_dir / "history.jsonl")
    assert all(row["routing.language_model.entropy"] > 0 for row in history)

    before = stage.spec()
    assert Upcycle(**settings, parts=stage.parts).spec() == before
    my_router.write_text(block("python") + "\n# another router\n")
    assert Upcycle(**settings, parts=stage.parts).spec() != before


def test_the_trainer_moves_schedules_on(my_router: Path, job):
    my_router.write_text(
        block("python")
        + """

seen = []


class Watched(Sharpened):
    class Settings(Sharpened.Settings):  # may also be written inside
        start: float = 1.0

    def step(self, progress):
        super().step(progress)
        seen.append((round(progress, 3), self.scheduled(self.settings.start, 4.0)))
"""
    )
    run_stage(Finetune(**COMMON, max_steps=1), dense := job("dense"))
    run_stage(
        Upcycle(moe={"router": "my_router:Watched", "placement": [0]}), sparse := job("sparse", parent=dense.model_dir)
    )
    run_stage(Finetune(**COMMON, max_steps=4), job("tuned", parent=sparse.model_dir))
    assert sys.modules["my_router"].seen == [(0.0, 1.0), (0.25, 1.75), (0.5, 2.5), (0.75, 3.25)]


def test_a_file_that_is_not_there_is_asked_for_before_anything_runs(my_router: Path):
    from mmpipe.settings import validate

    with pytest.raises(ConfigError, match=r"recipe: .*no module 'my_ruoter': put my_ruoter.py into"):
        validate(Upcycle, {"moe": {"router": "my_ruoter:Sharpened"}}, "recipe")


@pytest.mark.parametrize("router", ["cosine", "xmoe"])
def test_a_temperature_falls_in_training_and_stays_low(router: str):
    from mmpipe.models.moe.routers.base import build
    from mmpipe.models.moe.spec import MoESettings

    own = {"temperature": 1.0, "final_temperature": 0.1}
    made = build(MoESettings(router=router, router_settings=own), 16).train()
    made.reset_parameters(torch.Generator().manual_seed(0))
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    entropies = []
    for progress in (0.0, 0.5, 1.0):
        made.step(progress)
        entropies.append(made(x).statistics["entropy"].item())
    assert entropies == sorted(entropies, reverse=True)
    made.step(0.0)
    assert made.eval()(x).statistics["entropy"].item() == pytest.approx(entropies[-1])
