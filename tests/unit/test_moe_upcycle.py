"""Up-cycling keeps the function, places experts where asked, and starts routers reproducibly."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_llava import batch, llava
from torch import nn

from mmpipe.errors import ArtifactError, ConfigError, MmpipeError
from mmpipe.models.moe.collect import collect_losses, collect_statistics, moe_layers
from mmpipe.models.moe.spec import MoESettings
from mmpipe.models.moe.upcycle import assert_equal_to_parent, logits, saved_moe_settings, upcycle


@pytest.mark.parametrize("kind", ["qwen2", "llama", "phi3"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_fresh_sparse_model_is_its_dense_parent(kind: str, residual: bool) -> None:
    dense = llava(kind)
    sparse = upcycle(copy.deepcopy(dense), MoESettings(residual=residual))
    assert assert_equal_to_parent(dense, sparse, batch()) < 2e-6


def test_a_sparse_model_that_differs_is_an_error_with_the_difference() -> None:
    dense = llava()
    before = logits(dense, batch())
    sparse = upcycle(dense, MoESettings())
    next(iter(moe_layers(sparse).values())).experts.down_proj.data[0] *= 1.5
    with pytest.raises(ArtifactError, match=r"differs from its dense parent by 0\.\d+"):
        assert_equal_to_parent(before, sparse, batch())
    with pytest.raises(ArtifactError, match="single expert is weighed by its probability"):
        assert_equal_to_parent(llava(), upcycle(llava(), MoESettings(top_k=1)), batch())


def test_experts_are_copies_and_only_the_chosen_layers_change() -> None:
    dense = llava("phi3", layers=5)
    sparse = upcycle(copy.deepcopy(dense), MoESettings(experts=3, placement=(1, 4)))
    assert list(moe_layers(sparse)) == ["language_model.layers.1.mlp", "language_model.layers.4.mlp"]
    before, after = dense.model.language_model, sparse.model.language_model
    for expert in range(3):
        assert torch.equal(after.layers[4].mlp.experts.gate_up_proj[expert], before.layers[4].mlp.gate_up_proj.weight)
        assert torch.equal(after.layers[4].mlp.experts.down_proj[expert], before.layers[4].mlp.down_proj.weight)
    assert torch.equal(after.layers[0].mlp.gate_up_proj.weight, before.layers[0].mlp.gate_up_proj.weight)


def test_routers_start_differently_by_layer_and_seed_and_never_by_chance() -> None:
    def weights(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        torch.manual_seed(int(torch.randint(1000, ())))
        model = upcycle(llava().to(dtype), MoESettings(), seed=seed)
        return [moe.router.weight.detach() for moe in moe_layers(model).values()]

    first, second = weights(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, weights(0)[0])
    assert not torch.equal(first, weights(1)[0])
    assert torch.equal(first.bfloat16(), weights(0, torch.bfloat16)[0])
    bound = 32**-0.5
    assert first.abs().max() <= bound
    assert first.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)


def test_global_random_state_is_left_alone() -> None:
    model = llava()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    upcycle(model, MoESettings(residual=True))
    assert torch.equal(torch.rand(3), expected)


def test_networks_that_cannot_become_experts() -> None:
    with pytest.raises(ConfigError, match=r"layer 0: a 'LlamaMLP' with linear layers \(gate_proj with bias"):
        upcycle(llava("llama", mlp_bias=True), MoESettings())
    with pytest.raises(ConfigError, match="already has experts"):
        upcycle(upcycle(llava(), MoESettings()), MoESettings())
    model = llava()
    model.model.language_model.layers[0].mlp = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32))
    with pytest.raises(ConfigError, match=r"'Sequential' with linear layers .* cannot become experts"):
        upcycle(model, MoESettings())


def test_settings_are_noted_in_the_configuration() -> None:
    model = upcycle(llava(), MoESettings(experts=3))
    assert saved_moe_settings(model) == {"language_model": MoESettings(experts=3)}


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_towers_and_projectors_get_experts_too(tower: str) -> None:
    dense = llava(tower=tower, hidden_size=48)
    sparse = copy.deepcopy(dense)
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        upcycle(sparse, MoESettings(placement="dense", balance_within="sequence"), part=part)
    assert list(moe_layers(sparse)) == [
        "vision_tower.encoder.layers.0.mlp",
        "multi_modal_projector",
        *(f"language_model.layers.{i}.mlp" for i in range(4)),
    ], "the tower's last layer is not projected, so experts there would be idle"
    rows = batch()
    assert assert_equal_to_parent(dense, sparse, rows) < 5e-6

    loss = sparse.train()(**rows, use_cache=False).logits.square().mean()
    (loss + collect_losses(sparse)[0]).backward()
    statistics = collect_statistics(sparse)
    tokens = 5 if tower == "clip" else 4
    assert statistics["vision_tower.encoder.layers.0.mlp"]["tokens"].item() == 3 * tokens
    assert statistics["multi_modal_projector"]["tokens"].item() == 3 * 4
    for moe in moe_layers(sparse).values():
        assert moe.router.weight.grad.any()


def test_the_reference_gives_experts_to_the_idle_layer() -> None:
    settings = MoESettings(placement="dense", compat="reference")
    model = upcycle(llava(), settings, part="vision_tower")
    assert list(moe_layers(model)) == [f"vision_tower.encoder.layers.{i}.mlp" for i in range(2)]


@pytest.mark.parametrize("router", ["topk", "xmoe", "shared", "tcmoe", "moepp", "remoe", "cosine", "hyper"])
def test_layers_start_alike_only_where_the_reference_does(router: str) -> None:
    def distinct(form: str) -> int:
        settings = MoESettings(placement="dense", router=router, router_settings={"compat": form}, experts=4, top_k=2)
        layers = moe_layers(upcycle(llava(), settings)).values()
        return len({next(layer.router.parameters()).sum().item() for layer in layers})

    assert distinct("fixed") == 4
    assert distinct("reference") == (4 if router in ("cosine", "hyper") else 1)


def test_the_entropy_loss_is_weighed_and_off_by_default() -> None:
    parts = []
    for coefficient in (0.0, 0.5):
        model = upcycle(llava(), MoESettings(entropy_coefficient=coefficient, balance_coefficient=0)).train()
        model(**batch(), use_cache=False)
        parts.append(collect_losses(model)[1])
    assert parts[0] == {}
    entropies = [s["entropy"] for s in collect_statistics(model).values()]
    torch.testing.assert_close(parts[1]["entropy"], 0.5 * torch.stack(entropies).sum())


def test_a_router_that_errs_is_named_with_its_place() -> None:
    model = upcycle(llava(), MoESettings(placement=(2,)), part="language_model")
    moe = model.model.language_model.layers[2].mlp
    moe.router.weight.data.fill_(float("nan"))
    with pytest.raises(MmpipeError, match=r"router 'topk' in language_model.layers.2.mlp: .*not finite"):
        model(**batch())


def test_a_router_that_adds_its_input_needs_equal_widths() -> None:
    with pytest.raises(ConfigError, match="the projector: the router 'moepp' adds its input"):
        upcycle(llava(hidden_size=48), MoESettings(router="moepp"), part="multi_modal_projector")
