"""LibMoE's path: two scales, every part pre-finetuned, experts in tower and projector, trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmpipe.artifacts.files import read_jsonl
from mmpipe.benchmarks.base import Question
from mmpipe.checkpoints.load import open_checkpoint
from mmpipe.data.templates import get_template
from mmpipe.errors import ConfigError
from mmpipe.inference.generate import Answerer
from mmpipe.models.moe.collect import moe_layers
from mmpipe.models.moe.upcycle import saved_moe_settings
from mmpipe.models.settings import VisionLanguage
from mmpipe.report.figures import draw_history
from mmpipe.stages.finetune import Finetune
from mmpipe.stages.prefinetune import Prefinetune
from mmpipe.stages.pretrain import Pretrain
from mmpipe.stages.upcycle import Upcycle
from mmpipe.training.run import run_stage

COMMON = {"data": "mix", "template": "qwen", "batch_size": 8, "max_steps": 2, "learning_rate": 1e-3}
MODEL = {"vision": "clip-tiny", "language": "qwen2-tiny", "scales": [1, 3]}
PARTS = {"vision_tower": {"placement": "dense", "top_k": 1}, "multi_modal_projector": {"experts": 3}}
SPEC = json.dumps({"stage": "pretrain", "model": MODEL})


@pytest.fixture
def made(job):
    """Jobs of a model that sees two scales."""

    def make(name: str, **changes):
        return replace(job(name, **changes), spec=SPEC, vision_language=VisionLanguage(**MODEL))

    return make


def test_the_whole_path(made, tmp_path: Path):
    pretrained, dense, sparse, tuned = (made(name) for name in ("pretrain", "pft", "sparse", "sft"))
    run_stage(Pretrain(**COMMON), pretrained)
    run_stage(Prefinetune(**COMMON), replace(dense, parent=pretrained.model_dir))
    moe = {"router": "perturbed_cosine", "z_coefficient": 0.01, "layer_losses": "mean"}
    moe["balance_within"] = "sequence"
    parts = PARTS | {"vision_tower": {"placement": "dense"}}
    run_stage(Upcycle(moe=moe, parts=parts), replace(sparse, parent=dense.model_dir))
    run_stage(Finetune(**COMMON, trainable=["*"]), replace(tuned, parent=sparse.model_dir))

    before, after = (open_checkpoint(run.model_dir)[0] for run in (sparse, tuned))
    assert list(moe_layers(after)) == ["vision_tower.encoder.layers.0.mlp", "multi_modal_projector"]
    assert saved_moe_settings(after)["multi_modal_projector"].experts == 3
    assert after.config.text_config.model_type == "qwen2", "no experts were asked for there"
    old = dict(before.named_parameters())
    same = [name for name, p in after.named_parameters() if torch.equal(p, old[name])]
    assert not [name for name in same if "tower" in name or "projector" in name], "everything learns"

    rows = read_jsonl(tuned.report_dir / "history.jsonl")
    for part, experts in {"vision_tower": 4, "multi_modal_projector": 3}.items():
        for row in rows:
            assert 1 / experts <= row[f"routing.{part}.load"] <= 0.5 + 1e-6
            assert row[f"routing.{part}.entropy"] > 0
            assert 0 <= row[f"routing.{part}.margin"] <= 1
    assert rows[0]["loss"] == pytest.approx(
        rows[0]["cross_entropy"] + rows[0]["router_balance"] + rows[0]["router_z"], rel=1e-4
    )
    draw_history(tuned.report_dir / "history.jsonl", tmp_path / "loss.svg")
    assert "busiest expert" in (tmp_path / "loss.svg").read_text()


def test_images_at_two_scales_are_answered_alike_from_shared_beginnings(made, demo_files: Path):
    dense = made("dense")
    run_stage(Prefinetune(**COMMON), dense)
    model, processor, _ = open_checkpoint(dense.model_dir)
    assert model.config.image_seq_length == 9, "as many tokens as at one scale"
    image = next(Path("resources/datasets/shapes").rglob("*.jpg"))
    questions = [Question(id=i, text=f"What is this, {i}?", images=(image,)) for i in range(3)]
    answerer = Answerer(model, processor, get_template("qwen", processor.tokenizer))
    answers = [
        {a["question_id"]: a["text"] for a in answerer.answer(questions, max_new_tokens=6, share_prefix=share)}
        for share in (True, False)
    ]
    assert answers[0] == answers[1]


def test_each_part_has_settings_of_its_own():
    stage = Upcycle(moe={"experts": 8, "router": "cosine", "router_settings": {"temperature": 0.2}}, parts=PARTS)
    parts = stage.of_parts()
    assert list(parts) == ["vision_tower", "multi_modal_projector"]
    assert (parts["vision_tower"].experts, parts["vision_tower"].top_k) == (8, 1)
    assert parts["multi_modal_projector"].experts == 3
    assert parts["multi_modal_projector"].router_settings == {"temperature": 0.2}
    other = Upcycle(moe=stage.moe, parts={"language_model": {"router": "topk"}})
    assert other.of_parts()["language_model"].router_settings == {}
    assert Upcycle(moe={"experts": 8}).spec() == {"moe": {"experts": 8}}
    new, former = (
        {"vision_tower": {"router": "xmoe", "router_settings": {key: "reference"}}} for key in ("compat", "form")
    )
    with pytest.warns(FutureWarning, match="'form' is now called 'compat'"):
        published = Upcycle(parts=former).spec()
    assert Upcycle(parts=new).spec() == published
    assert published["parts"] == former


def test_a_router_that_computes_something_else_than_before_makes_its_stages_new():
    assert Upcycle(moe={"router": "hyper"}).spec()["router_versions"] == {"language_model": 2}
    assert "router_versions" not in Upcycle(moe={"router": "cosine"}).spec()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"vision_tower": {"expets": 3}}, "parts.vision_tower: unknown key 'expets'; did you mean 'experts'"),
        ({"vision_tower": {"top_k": 5}}, "parts.vision_tower: top_k is 5, but there are only 4 experts"),
        ({"language_model": {"router": "cosin"}}, "there is no router 'cosin'; did you mean 'cosine'"),
        ({"vision": {}}, "vision"),
        ({}, "at least 1 item"),
    ],
)
def test_mistakes_in_the_settings_of_a_part_are_named(parts, message):
    from mmpipe.settings import validate

    with pytest.raises(ConfigError, match=message):
        validate(Upcycle, {"parts": parts}, "recipe.yaml")


def test_layers_that_a_part_does_not_have_are_named(made):
    dense = made("dense")
    run_stage(Prefinetune(**COMMON), dense)
    with pytest.raises(ConfigError, match=r"vision_tower.*layers 0 to 0, not \[1\]"):
        run_stage(Upcycle(parts={"vision_tower": {"placement": [1]}}), made("sparse", parent=dense.model_dir))
