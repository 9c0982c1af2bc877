"""Adapters learn, the rest stays; what is published is the adapter and an ordinary checkpoint with it merged in."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts_data import tiny_model
from pydantic import ValidationError
from safetensors.torch import load_file
from test_training import finetune, start

from mmpipe.artifacts.files import sha256
from mmpipe.checkpoints.load import open_checkpoint
from mmpipe.errors import ConfigError
from mmpipe.models.settings import LoraSettings
from mmpipe.stages.pretrain import Pretrain
from mmpipe.training import launch
from mmpipe.training.run import run_stage

LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
STAGE = finetune(lora=LORA, seed=3, max_steps=4)


@pytest.fixture
def tuned(job):
    made = job("tuned")
    run_stage(STAGE, made)
    return made


def test_the_checkpoint_is_the_base_with_the_adapter_added(tuned):
    base, _ = tiny_model(seed=3)
    merged = open_checkpoint(tuned.model_dir)[0].state_dict()
    adapter = load_file(tuned.model_dir / "adapter/adapter_model.safetensors")
    adapted = set()
    for name, tensor in base.state_dict().items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in adapter:
            adapted.add(name)
            change = adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"] * 2
            assert change.abs().max() > 0
            torch.testing.assert_close(merged[name], tensor + change, rtol=1e-5, atol=1e-6)
        elif ".multi_modal_projector." in name:
            assert not torch.equal(merged[name], tensor)
        else:
            assert torch.equal(merged[name], tensor), name
    assert len(adapter) == 2 * len(adapted) == 2 * 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in adapted)


def test_the_adapter_can_be_put_on_the_base_by_peft_alone(tuned):
    from peft import PeftModel

    base, _ = tiny_model(seed=3)
    merged = open_checkpoint(tuned.model_dir)[0]
    base.model.multi_modal_projector.load_state_dict(merged.model.multi_modal_projector.state_dict())
    adapted = PeftModel.from_pretrained(base, str(tuned.model_dir / "adapter")).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    files = json.loads((tuned.model_dir / "manifest.json").read_text())["files"]
    assert {"model.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= files.keys()


def test_the_next_stage_starts_from_the_merged_checkpoint(tuned, job):
    following = job("following", parent=tuned.model_dir)
    run_stage(finetune(max_steps=1, learning_rate=1e-9), following)
    before, after = (load_file(d / "model.safetensors") for d in (tuned.model_dir, following.model_dir))
    assert before.keys() == after.keys()


def test_killed_and_run_again_it_ends_with_the_same_bytes(tuned, job):
    places = job("killed")
    made = replace(tuned, **{name: getattr(places, name) for name in ("model_dir", "state_dir", "report_dir")})
    with start(STAGE, made) as process:
        deadline = time.monotonic() + 120
        while not (made.state_dir / "checkpoints/checkpoint-2/complete").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert not (made.model_dir / "manifest.json").exists()
    run_stage(STAGE, made)
    for part in ("", "adapter"):
        assert contents(made.model_dir / part) == contents(tuned.model_dir / part)


def contents(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in directory.iterdir() if path.is_file()}


@pytest.mark.slow
def test_two_processes_train_like_one(job):
    stage = finetune(lora=LORA | {"dropout": 0.0}, max_steps=3)
    one, two = job("one"), job("two")
    run_stage(stage, one)
    two.state_dir.mkdir(parents=True)
    launch.run_processes(stage, two, 2)
    names = ("model.safetensors", "adapter/adapter_model.safetensors")
    for before, after in ((load_file(one.model_dir / n), load_file(two.model_dir / n)) for n in names):
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_misspelt_target_is_named(job):
    wrong = finetune(lora=LORA | {"targets": ("language_model.layers.*.q_prj",)})
    with pytest.raises(
        ConfigError, match=r"'language_model\.layers\.\*\.q_prj' matches no linear layer; the nearest names: .*_proj"
    ):
        run_stage(wrong, job("wrong"))


def test_what_contradicts_adapters_is_refused():
    with pytest.raises(ValidationError, match="'lora' adapts the language model"):
        Pretrain(data="mix", lora={})
    with pytest.raises(ValidationError, match=r"name what trains whole in 'lora\.beside'"):
        finetune(lora={}, trainable=("lm_head.*",))


def test_without_adapters_nothing_changes_in_the_spec():
    assert "lora" not in finetune().spec()
    assert finetune(lora={"rank": 128}).spec()["lora"] == {}
    assert LoraSettings().targets == ("language_model.layers.*_proj",)
