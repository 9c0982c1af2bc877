"""Top-2 gating, capacity, dropping and the balance loss against DeepSpeed's, which LLaVA-MoD trains with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmpipe.losses.routing import load_balancing_loss
from mmpipe.models.moe.layer import capacity, drop, slot_numbers
from mmpipe.models.moe.routers import topk
from mmpipe.models.moe.routers.base import Routing, build
from mmpipe.models.moe.spec import MoESettings, layer_indices

VECTORS = Path(__file__).parents[1] / "fixtures" / "vectors" / "llava_mod"
GATING = json.loads((VECTORS / "07_gating_and_aux_loss.json").read_text())
LOGITS = torch.tensor(GATING["inputs"]["gate_logits"])
TOP_2 = [name for name in GATING["expected"] if name.startswith("cf")]


def route(top_k: int, **settings: object) -> Routing:
    router = build(MoESettings(experts=4, top_k=top_k, router_settings=settings), width=4)
    # with the unit matrix as weight, the hidden states are the logits
    router.weight.data.copy_(torch.eye(4))
    return router(LOGITS)


def dense(routing: Routing, weights_TK: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(weights_TK), 4).scatter(1, routing.indices_TK, weights_TK)


@pytest.mark.parametrize("name", TOP_2)
def test_top_2_weights_drops_and_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = GATING["expected"][name]
    monkeypatch.setattr(topk, "gumbel", lambda like: torch.tensor(GATING["inputs"]["gumbel_noise"]))
    choice = "gumbel_always" if "gumbel" in name else "most_likely"
    routing = route(2, second_choice=choice)
    slots = capacity(8, 4, 2, expected["capacity_factor"], expected["min_capacity"])
    assert slots == expected["capacity"]
    weights_TK, kept_TK = drop(routing.indices_TK, routing.weights_TK, 4, slots, rescale=True)
    combined = torch.tensor(expected["combine_weights_se"])
    torch.testing.assert_close(dense(routing, weights_TK), combined, atol=1e-6, rtol=1e-6)
    assert routing.losses["balance"].item() == pytest.approx(expected["l_aux"], abs=1e-6)

    places = slot_numbers(routing.indices_TK, 4)
    ours = {(t, int(routing.indices_TK[t, k]), int(places[t, k])) for t in range(8) for k in range(2) if kept_TK[t, k]}
    assert ours == {tuple(place) for place in expected["slots_of_dispatched_tokens"]}
    counts = torch.bincount(routing.indices_TK.flatten(), minlength=4)
    assert counts.tolist() == expected["exp_counts_ds0198"]


def test_top_1_is_weighed_by_its_probability() -> None:
    expected = GATING["expected"]["top1_cf1.5_no_rts"]
    routing = route(1)
    slots = capacity(8, 4, 1, 1.5)
    assert slots == expected["capacity"]
    weights_TK, _ = drop(routing.indices_TK, routing.weights_TK, 4, slots, rescale=False)
    combined = torch.tensor(expected["combine_weights_se"])
    torch.testing.assert_close(dense(routing, weights_TK), combined, atol=1e-6, rtol=1e-6)
    assert routing.losses["balance"].item() == pytest.approx(expected["l_aux"], abs=1e-6)
    assert torch.bincount(routing.indices_TK.flatten(), minlength=4).tolist() == expected["exp_counts_ds0198"]


def test_top_3_without_drops() -> None:
    expected = GATING["expected"]["topk3_cf1.5_probs_drop_ds0198_only"]
    routing = route(3)
    slots = capacity(8, 4, 3, 1.5)
    assert slots == expected["capacity"]
    weights_TK, kept_TK = drop(routing.indices_TK, routing.weights_TK, 4, slots, rescale=True)
    assert kept_TK.all()
    combined = torch.tensor(expected["combine_weights_se"])
    torch.testing.assert_close(dense(routing, weights_TK), combined, atol=1e-6, rtol=1e-6)
    assert torch.bincount(routing.indices_TK.flatten(), minlength=4).tolist() == expected["exp_counts_ds0198"]


def test_balance_loss_limits() -> None:
    balanced = torch.zeros(8, 4)
    balanced[torch.arange(8), torch.arange(8) % 4] = 1e-3
    collapsed = torch.zeros(8, 4)
    collapsed[:, 2] = 30
    limits = GATING["l_aux_limits"]
    for logits, name in ((balanced, "nearly_uniform_balanced"), (collapsed, "collapsed_on_expert2")):
        loss = load_balancing_loss(logits.softmax(1), logits.argmax(1))
        assert loss.item() == pytest.approx(limits[name], abs=1e-6)


def test_placement_of_experts() -> None:
    expected = json.loads((VECTORS / "09_moe_layers_and_trainable.json").read_text())["expected"]
    for layers, modes in expected["moe_layer_indices"].items():
        for mode, indices in modes.items():
            placement = tuple(json.loads(mode.removeprefix("custom "))) if mode.startswith("custom") else mode
            assert layer_indices(placement, int(layers)) == indices
