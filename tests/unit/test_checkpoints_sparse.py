"""Sparse models as stock checkpoints: the function, the names, the traps, and the way back."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import batch, llava, processor
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from mmpipe import registry
from mmpipe.checkpoints.roundtrip import check_roundtrip, reference
from mmpipe.checkpoints.save import load_checkpoint, save_checkpoint
from mmpipe.errors import ArtifactError
from mmpipe.models.moe.collect import collect_losses, moe_layers
from mmpipe.models.moe.hf import why_not_stock
from mmpipe.models.moe.layer import MoELayer
from mmpipe.models.moe.modeling_mmpipe_llava import SparseLlava
from mmpipe.models.moe.spec import ROUTERS, MoESettings
from mmpipe.models.moe.upcycle import logits, upcycle


def trained(kind: str, **settings: object) -> LlavaForConditionalGeneration:
    """A sparse model whose experts have become different."""
    model = upcycle(llava(kind), MoESettings(**settings))
    torch.manual_seed(2)
    for moe in moe_layers(model).values():
        for parameter in moe.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


CASES = [
    ("qwen2", {"placement": "sparse"}, "qwen2_moe"),
    ("qwen2", {"placement": "dense", "experts": 3, "top_k": 3}, "qwen2_moe"),
    ("qwen2", {"top_k": 1}, "qwen2_moe"),
    ("llama", {"placement": "dense"}, "mixtral"),
    ("llama", {"placement": "second_half"}, "qwen2_moe"),
    ("phi3", {"placement": "dense"}, "mixtral"),
    ("phi3", {"placement": (3,), "top_k": 1}, "qwen2_moe"),
]


@pytest.mark.parametrize(("kind", "settings", "family"), CASES)
def test_stock_transformers_computes_the_same(tmp_path: Path, kind: str, settings: dict, family: str) -> None:
    model = trained(kind, **settings)
    save_checkpoint(model, processor(), tmp_path)
    stock, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(stock) is LlavaForConditionalGeneration
    assert stock.config.text_config.model_type == family
    assert not any(isinstance(module, MoELayer) for module in stock.modules())
    rows = batch()
    torch.testing.assert_close(logits(stock, rows), logits(model, rows), atol=1e-5, rtol=1e-5)
    one = batch(rows=1, padded=0)
    ours, theirs = (m.generate(**one, max_new_tokens=6, do_sample=False) for m in (model, stock))
    assert torch.equal(ours, theirs)
    assert type(AutoProcessor.from_pretrained(tmp_path)).__name__ == "LlavaProcessor"


@pytest.mark.parametrize(("kind", "settings", "family"), CASES)
def test_the_way_back_is_exact(tmp_path: Path, kind: str, settings: dict, family: str) -> None:
    model = trained(kind, **settings, balance_coefficient=0.5, capacity_factor=1.5)
    save_checkpoint(model, processor(), tmp_path / "a")
    again, its_processor = load_checkpoint(tmp_path / "a")
    assert list(moe_layers(again)) == list(moe_layers(model))
    for name, moe in moe_layers(model).items():
        assert moe_layers(again)[name].settings == moe.settings
        for (key, tensor), other in zip(
            moe.state_dict().items(), moe_layers(again)[name].state_dict().values(), strict=True
        ):
            assert torch.equal(tensor, other), key
    rows = batch()
    torch.testing.assert_close(logits(again, rows), logits(model, rows), atol=1e-5, rtol=1e-5)
    again.train()(**rows, use_cache=False)
    assert collect_losses(again)[0].requires_grad

    save_checkpoint(again, its_processor, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_configuration_states_what_readers_guess_wrong(tmp_path: Path) -> None:
    save_checkpoint(trained("qwen2"), processor(), tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text["architectures"] == ["Qwen2MoeForCausalLM"]
    assert text["mlp_only_layers"] == [1, 3]
    assert text["norm_topk_prob"] is True
    assert text["shared_expert_intermediate_size"] == 64
    assert text["moe_intermediate_size"] == text["intermediate_size"] == 48
    assert text["rope_theta"] == 1_000_000.0
    tensors = load_file(tmp_path / "model.safetensors")
    layer = "language_model.model.layers.0.mlp."
    assert not tensors[f"{layer}shared_expert.down_proj.weight"].any()
    assert tensors[f"{layer}experts.3.gate_proj.weight"].shape == (48, 32)
    assert tensors[f"{layer}gate.weight"].shape == (4, 32)
    assert f"{layer}experts.gate_up_proj" not in tensors


def test_sliding_windows_and_scaled_rope_are_carried_over(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.1, 2.2, 2.3],
    }
    for placement in ("dense", "sparse"):
        model = upcycle(
            llava("phi3", sliding_window=6, rope_parameters=rope, original_max_position_embeddings=128),
            MoESettings(placement=placement),
        )
        save_checkpoint(model, processor(), tmp_path / placement)
        stock = AutoModelForImageTextToText.from_pretrained(tmp_path / placement)
        torch.testing.assert_close(logits(stock, batch()), logits(model, batch()), atol=1e-5, rtol=1e-5)
    unlimited = copy.deepcopy(model)
    unlimited.model.language_model.config.sliding_window = None
    assert not torch.allclose(logits(unlimited, batch()), logits(model, batch())), "the window matters here"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router_settings": {"second_choice": "gumbel_always"}}, "samples experts in evaluation"),
        ({"residual": True}, "mixes its experts with a dense network"),
    ],
)
def test_what_no_stock_class_computes_is_a_class_of_ours(settings: dict, message: str, tmp_path: Path) -> None:
    model = trained("qwen2", **settings)
    assert message in (why_not_stock(model) or "")
    save_checkpoint(model, processor(), tmp_path / "a")
    again, its_processor = load_checkpoint(tmp_path / "a")
    assert type(again) is SparseLlava
    for (name, tensor), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    if "residual" in settings:
        torch.testing.assert_close(logits(again, batch()), logits(model, batch()), atol=1e-5, rtol=1e-5)
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path / "a")
    assert type(auto) is SparseLlava

    save_checkpoint(again, its_processor, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_experts_in_tower_and_projector_are_stored(tmp_path: Path) -> None:
    model = llava(hidden_size=48)
    for part in ("vision_tower", "multi_modal_projector"):
        upcycle(model, MoESettings(experts=3, placement="dense"), part=part)
    assert "experts in the multi_modal_projector and the vision_tower" in (why_not_stock(model) or "")
    save_checkpoint(model, processor(), tmp_path)
    again, _ = load_checkpoint(tmp_path)
    assert list(moe_layers(again)) == list(moe_layers(model))
    torch.testing.assert_close(logits(again, batch()), logits(model, batch()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("router", [name for name in registry.names(ROUTERS) if name != "topk"])
def test_every_router_is_stored_with_its_model(router: str, tmp_path: Path) -> None:
    model = trained("qwen2", router=router).eval()
    save_checkpoint(model, processor(), tmp_path)
    again, _ = load_checkpoint(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(logits(again, batch()), logits(model, batch()), atol=1e-5, rtol=1e-5)
    loss = again.train()(**batch(), use_cache=False).logits.square().mean() + collect_losses(again)[0]
    loss.backward()
    for name, moe in moe_layers(again).items():
        for part, parameter in moe.router.named_parameters():
            assert parameter.grad is not None, f"{name}.{part}"
            assert torch.isfinite(parameter.grad).all(), f"{name}.{part}"


def test_plain_transformers_refuses_what_it_cannot_compute(tmp_path: Path) -> None:
    model = trained("qwen2", residual=True)
    save_checkpoint(model, processor(), tmp_path)
    with pytest.raises(ArtifactError, match="mmpipe_llava"):
        check_roundtrip(tmp_path, reference(model, [batch(rows=1, padded=0)], max_new_tokens=1))


def test_attention_without_a_counterpart_is_refused(tmp_path: Path) -> None:
    model = upcycle(llava("llama", attention_bias=True), MoESettings())
    with pytest.raises(ArtifactError, match="output bias: True"):
        save_checkpoint(model, processor(), tmp_path)


def test_a_damaged_checkpoint_of_ours_is_an_error_and_a_foreign_one_is_left_alone(tmp_path: Path) -> None:
    save_checkpoint(trained("qwen2"), processor(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["language_model.model.layers.2.mlp.shared_expert.down_proj.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="shared expert that adds something"):
        load_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["mmpipe"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    foreign, _ = load_checkpoint(tmp_path)
    assert not moe_layers(foreign)


def test_a_foreign_sparse_model_gets_our_layers(tmp_path: Path) -> None:
    model = trained("llama", placement="dense")
    save_checkpoint(model, processor(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["mmpipe"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    foreign, _ = load_checkpoint(tmp_path)
    assert next(iter(moe_layers(foreign).values())).settings == MoESettings(placement=(0, 1, 2, 3))
    torch.testing.assert_close(logits(foreign, batch()), logits(model, batch()), atol=1e-5, rtol=1e-5)


def test_the_former_key_of_a_router_opens_and_identifies(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    settings = MoESettings(router="cosine", router_settings={"compat": "reference", "perturbation": 0.1})
    save_checkpoint(trained("qwen2", router="cosine", router_settings=settings.router_settings), processor(), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["mmpipe"]["moe"]["language_model"]
    assert written["router_settings"] == {"form": "reference", "perturbation": 0.1}
    model, _ = load_checkpoint(tmp_path)
    (moe, *_) = moe_layers(model).values()
    assert moe.router.reference
    assert type(moe.router).__name__ == "CosineRouter"
    assert not [warning for warning in recwarn if warning.category is FutureWarning]
    with pytest.warns(FutureWarning, match="the key 'form' is now called 'compat'"):
        former = MoESettings(router="cosine", router_settings={"form": "reference", "perturbation": 0.1})
    assert former == settings
    assert former.identity()["router_settings"] == written["router_settings"]
