"""A recipe may start from a whole checkpoint: brought in once, then an ordinary checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from layouts_data import BACKBONES, stock_checkpoint
from safetensors.torch import load_file, save_file

from mmpipe.checkpoints.load import open_checkpoint
from mmpipe.errors import ArtifactError, ConfigError
from mmpipe.models.settings import VisionLanguage
from mmpipe.stages.construct import Construct
from mmpipe.stages.finetune import Finetune
from mmpipe.stages.pretrain import Pretrain
from mmpipe.training.run import run_stage

TRAINING = {"data": "mix", "batch_size": 8, "max_steps": 2, "template": "chatml"}


def bringing_in(job, source, name="construct", **changes):
    facts = {
        "spec": json.dumps({"stage": "construct", "model": {"checkpoint": "whole"}}),
        "vision_language": VisionLanguage(checkpoint="whole"),
        "backbones": {"checkpoint": source},
        "manifests": (),
        "tokens": None,
    }
    return job(name, **{**facts, **changes})


def following(job, parent, name, stage):
    spec = json.dumps({"stage": stage, "model": {"checkpoint": "whole"}})
    return job(name, spec=spec, vision_language=VisionLanguage(checkpoint="whole"), backbones={}, parent=parent)


@pytest.fixture
def whole(job, tmp_path):
    """A stock checkpoint in bfloat16, brought in: its directory and the model it was made from."""
    source = tmp_path / "from-the-hub"
    model = stock_checkpoint(source, torch.bfloat16)
    brought = bringing_in(job, source)
    run_stage(Construct(template="chatml"), brought)
    return brought.model_dir, source, model


def test_a_whole_checkpoint_keeps_every_bit(whole):
    published, source, _ = whole
    before, after = (load_file(folder / "model.safetensors") for folder in (source, published))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], tensor), name


def test_it_can_be_trained_further_and_a_projector_finds_its_way_back(whole, job):
    published, _, original = whole
    aligned = following(job, published, "pretrain", "pretrain")
    run_stage(Pretrain(**TRAINING), aligned)
    model, _, card = open_checkpoint(aligned.model_dir)
    assert card["checkpoint"]["base"] == published.as_posix()
    assert torch.equal(model.lm_head.weight, original.lm_head.weight.float())
    tuned = following(job, aligned.model_dir, "finetune", "finetune")
    run_stage(Finetune(**TRAINING), tuned)
    finetuned, _, _ = open_checkpoint(tuned.model_dir)
    before, after = model.state_dict(), finetuned.state_dict()
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language_model", "multi_modal_projector", "weight"}


def test_parts_are_joined_and_published(job):
    joined = job("construct", tokens=None)
    run_stage(Construct(template="chatml"), joined)
    model, _, card = open_checkpoint(joined.model_dir)
    assert card["kind"] == "model"
    aligned = job("pretrain", parent=joined.model_dir)
    run_stage(Pretrain(**TRAINING), aligned)
    assert open_checkpoint(aligned.model_dir)[2]["checkpoint"]["base"] == joined.model_dir.as_posix()
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tensors: tensors.pop("language_model.model.norm.weight"), "the file lacks: .*norm"),
        (lambda tensors: tensors.update(surplus=torch.zeros(1)), "no place for: surplus"),
    ],
)
def test_missing_and_surplus_tensors_are_listed(whole, job, spoil, said):
    _, source, _ = whole
    tensors = load_file(source / "model.safetensors")
    spoil(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=said):
        run_stage(Construct(template="chatml"), bringing_in(job, source, "again"))


def test_a_language_model_is_no_whole_checkpoint(job):
    with pytest.raises(ArtifactError, match="holds a 'qwen2' model"):
        run_stage(Construct(), bringing_in(job, BACKBONES["language"]))


def test_parts_beside_a_complete_checkpoint_are_refused(whole, job):
    _, source, _ = whole
    crowded = bringing_in(job, source, "crowded", backbones={"checkpoint": source} | BACKBONES)
    with pytest.raises(ConfigError, match=r"is complete; leave model\.vision"):
        run_stage(Construct(), crowded)
