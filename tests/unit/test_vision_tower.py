"""Towers that see several scales, and what nobody reads of a tower."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llava import batch, llava, processor
from torch import nn

from mmpipe.checkpoints.save import load_checkpoint, save_checkpoint
from mmpipe.models.llava import image_features
from mmpipe.models.moe import hf
from mmpipe.models.moe.collect import collect_losses, collect_statistics, moe_layers
from mmpipe.models.moe.spec import MoESettings
from mmpipe.models.moe.upcycle import assert_equal_to_parent, logits, upcycle
from mmpipe.models.vision_tower import enable_multi_scale, freeze_unused, multi_scale_features, saved_scales

TOWERS = ("clip", "siglip")


def multi_scale(tower: str, scales: tuple[int, ...] = (1, 3)) -> Any:
    model = llava(tower=tower)
    enable_multi_scale(model, scales)
    torch.manual_seed(3)
    model.model.multi_modal_projector.linear_1.reset_parameters()
    return model


@pytest.mark.parametrize("tower", TOWERS)
def test_cutting_the_tower_changes_no_number(tower: str) -> None:
    model = llava(tower=tower)
    before, names = logits(model, batch()), set(model.state_dict())
    enable_multi_scale(model, (1,))
    assert torch.equal(logits(model, batch()), before)
    gone = names - set(model.state_dict())
    assert {name.split(".")[2] for name in gone} == {"encoder", "post_layernorm"} | (
        {"head"} if tower == "siglip" else set()
    )
    assert all("layers.1." in name for name in gone if "encoder" in name)


@pytest.mark.parametrize("tower", TOWERS)
def test_scale_one_stands_first_and_the_others_beside_it(tower: str) -> None:
    plain = llava(tower=tower)
    enable_multi_scale(plain, (1,))
    both = multi_scale(tower)
    pixels = batch()["pixel_values"]
    one = plain.model.vision_tower(pixels).hidden_states[-1]
    features = both.model.vision_tower(pixels).hidden_states[-1]
    assert features.shape == (3, one.shape[1], 2 * 32), "as many tokens, twice as wide"
    torch.testing.assert_close(features[..., :32], one)
    single = both.model.vision_tower(pixels[1:2]).hidden_states[-1]
    torch.testing.assert_close(features[1:2], single, atol=1e-5, rtol=1e-4)


def test_class_tokens_of_the_tiles_are_averaged() -> None:
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        tokens = nn.functional.avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)

    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    features = multi_scale_features(pixels, (1, 2), encode, class_tokens=1)
    assert features.shape == (2, 5, 6)
    torch.testing.assert_close(features[:, 0], features[:, 1:].mean(1))


@pytest.mark.parametrize("tower", TOWERS)
def test_it_generates_and_survives_the_disk(tower: str, tmp_path: Path) -> None:
    model = multi_scale(tower)
    assert "scales (1, 3)" in str(hf.why_not_stock(model))
    save_checkpoint(model, processor(), tmp_path)
    again, _ = load_checkpoint(tmp_path)
    assert saved_scales(again) == (1, 3)
    rows = batch(padded=0)
    assert torch.equal(logits(again, rows), logits(model, rows))
    answers = [m.generate(**rows, max_new_tokens=4, do_sample=False) for m in (model, again)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("tower", TOWERS)
def test_experts_in_every_part_of_a_model_with_two_scales(tower: str, tmp_path: Path) -> None:
    dense = multi_scale(tower)
    sparse = copy.deepcopy(dense)
    own = {
        "vision_tower": MoESettings(placement="dense", layer_losses="mean", balance_within="sequence"),
        "multi_modal_projector": MoESettings(experts=3, router="cosine"),
        "language_model": MoESettings(placement=(1,)),
    }
    for part, settings in own.items():
        upcycle(sparse, settings, part=part)  # type: ignore[arg-type]
    assert assert_equal_to_parent(dense, sparse, batch()) < 5e-6

    sparse.train()(**batch(), use_cache=False)
    statistics = collect_statistics(sparse)
    tokens = 5 if tower == "clip" else 4
    tower_layer = statistics["vision_tower.encoder.layers.0.mlp"]
    assert tower_layer["tokens"].item() == 3 * tokens * 10, "one image and nine tiles"
    assert statistics["multi_modal_projector"]["tokens"].item() == 3 * 4
    assert 0 <= tower_layer["entropy"].item() <= torch.tensor(4.0).log().item() + 1e-5
    save_checkpoint(sparse, processor(), tmp_path)
    again, _ = load_checkpoint(tmp_path)
    assert torch.equal(logits(again, batch()), logits(sparse, batch()))


def test_losses_are_averaged_over_layers_and_scales() -> None:
    model = llava(layers=2)
    model.model.vision_tower.encoder.layers.append(copy.deepcopy(model.model.vision_tower.encoder.layers[0]))
    model.config.vision_config.num_hidden_layers = 3
    enable_multi_scale(model, (1, 3))
    model.model.multi_modal_projector.linear_1.reset_parameters()
    upcycle(model, MoESettings(placement="dense", layer_losses="mean", balance_coefficient=0.5), part="vision_tower")
    model.train()(**batch(), use_cache=False)
    first, second = model.model.vision_tower.moe_forward_passes
    values = [
        current.reports[id(layer)].losses["balance"]
        for current in (first, second)
        for layer in moe_layers(model).values()
    ]
    assert len(values) == 2 * 2
    torch.testing.assert_close(collect_losses(model)[1]["balance"], torch.stack(values).mean())


def test_the_image_that_stands_in_for_none_is_not_counted() -> None:
    model = multi_scale("clip")
    for part in ("vision_tower", "multi_modal_projector"):
        upcycle(model, MoESettings(placement="dense"), part=part)  # type: ignore[arg-type]
    pixels = {"pixel_values": batch()["pixel_values"]}
    image_features(model.train(), {**pixels, "dummy_image": False})
    assert collect_losses(model)[0].item() > 0
    features = image_features(model, {**pixels, "dummy_image": True})
    total, _ = collect_losses(model)
    assert total.item() == 0
    assert all(s["tokens"].item() == 0 for s in collect_statistics(model).values())
    (total + 0.0 * features.sum()).backward()
    trained = [p for layer in moe_layers(model).values() for p in layer.parameters()]
    assert all(p.grad is not None and not p.grad.any() for p in trained), "every parameter takes part"


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = multi_scale("clip")
    upcycle(model, MoESettings(placement="dense"), part="vision_tower")
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        loss = model.train()(**batch(), use_cache=False).logits.square().mean() + collect_losses(model)[0]
        loss.backward()
        found.append([p.grad.clone() for p in model.model.vision_tower.parameters()])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("tower", TOWERS)
def test_unused_parameters_do_not_train(tower: str) -> None:
    model = llava(tower=tower).train()
    model.requires_grad_(True)
    idle = freeze_unused(model)
    model(**batch(), use_cache=False).logits.square().mean().backward()
    named = model.model.vision_tower.named_parameters()
    assert {name for name, p in named if p.requires_grad} == {
        name for name, p in model.model.vision_tower.named_parameters() if p.grad is not None
    }
    assert idle == [name for name, p in model.model.vision_tower.named_parameters() if not p.requires_grad]
    assert any(name.startswith("encoder.layers.1.") for name in idle)
