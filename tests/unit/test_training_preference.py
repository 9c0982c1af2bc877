"""A preference step: two passes that do not compete, and the router losses of both."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llava import batch, llava
from tiny_project import make_job
from torch import Tensor

from mmpipe.errors import ConfigError
from mmpipe.models.llava import hidden_states
from mmpipe.models.moe.collect import collect_losses, collect_statistics, moe_layers
from mmpipe.models.moe.spec import MoESettings
from mmpipe.models.moe.upcycle import upcycle
from mmpipe.stages.prefer import Prefer
from mmpipe.training.objectives import objective_class
from mmpipe.training.objectives.base import LossDenominators
from mmpipe.training.objectives.prefer import Preference, halves

PAIRS = 2


class Nothing:
    """A reference that finds every answer certain."""

    def log_probabilities(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(indices)), torch.zeros(len(indices))


def crowded(**settings: Any) -> Any:
    """A sparse model in training that has too little room for what its routers choose, with experts that differ."""
    model = upcycle(llava(), MoESettings(capacity_factor=0.6, **settings)).train()
    torch.manual_seed(5)
    for moe in moe_layers(model).values():
        for parameter in moe.experts.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        moe.router.weight.data[0] += 1.0
    return model


def pairs(rejected_seed: int) -> dict[str, Any]:
    """Two pairs; with the seed 1 their answers are the same."""
    chosen, rejected = batch(rows=PAIRS, seed=1), batch(rows=PAIRS, seed=rejected_seed, padded=5)
    if rejected_seed == 1:
        rejected = chosen
    both = {name: torch.cat([chosen[name], rejected[name]]) for name in ("input_ids", "attention_mask")}
    labels = both["input_ids"].clone()
    labels[:, :8] = -100
    labels[both["attention_mask"] == 0] = -100
    facts = {"ids": ["a", "b"], "indices": [0, 1], "dummy_image": False}
    return {**both, **facts, "labels": labels, "pixel_values": chosen["pixel_values"]}


def step(model: Any, rows: dict[str, Any], **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    stage = Prefer(data="mix", reference="base", **settings)
    return Preference(stage, Nothing())(model, rows, LossDenominators({"pairs": torch.tensor(PAIRS)}, 1))


@pytest.mark.parametrize("second_choice", ["most_likely", "gumbel"])
def test_equal_answers_are_equally_likely_where_experts_are_short_of_room(second_choice: str) -> None:
    model = crowded(router_settings={"second_choice": second_choice})
    _, metrics = step(model, pairs(1))
    dropped = [found["dropped"].item() for found in collect_statistics(model).values()]
    assert min(dropped) > 0, "the routers are to be crowded"
    if second_choice == "most_likely":
        assert metrics["rewards_margin"].item() == 0
    else:
        assert metrics["rewards_margin"].item() != 0, "both passes draw"


def test_router_losses_are_those_of_both_passes() -> None:
    model = crowded(balance_coefficient=0.5)
    rows = pairs(9)
    loss, metrics = step(model, rows)
    expected = []
    for half in halves(rows):
        hidden_states(model, half)
        expected.append(collect_losses(model)[1]["balance"])
    assert expected[0] != expected[1]
    torch.testing.assert_close(metrics["router_balance"], sum(expected))
    torch.testing.assert_close(loss.detach(), metrics["preference"] + metrics["router_balance"])
    off, measured = step(model, rows, router_losses=False)
    torch.testing.assert_close(off.detach(), metrics["preference"])
    torch.testing.assert_close(measured["router_balance"], metrics["router_balance"])
    tokens = metrics["routing.language_model.load"][1]
    assert tokens == rows["attention_mask"].sum() * len(moe_layers(model))


def test_both_passes_survive_gradient_checkpointing() -> None:
    model = crowded(balance_coefficient=0.5)
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    gradients = []
    for each in (model, checkpointed):
        step(each, pairs(9))[0].backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert gradients[0]["model.language_model.layers.0.mlp.router.weight"].any()
    assert gradients[0]["model.multi_modal_projector.linear_1.weight"].any()
    torch.testing.assert_close(gradients[1], gradients[0])


def test_halves_carry_no_padding_of_the_other() -> None:
    rows = pairs(9)
    rows["attention_mask"][PAIRS:, 9:] = 0
    chosen, rejected = halves(rows)
    assert chosen["input_ids"].shape == (PAIRS, 14)
    assert rejected["input_ids"].shape == rejected["labels"].shape == (PAIRS, 9)
    assert torch.equal(rejected["input_ids"], rows["input_ids"][PAIRS:, :9])


@pytest.mark.parametrize("kind", ["zero3", "zero3_offload"])
def test_experts_spread_by_stage_3_are_refused(kind: str) -> None:
    stage = Prefer(data="mix", reference="base", hardware={"deepspeed": kind})
    job = make_job(Path("nowhere"))
    with pytest.raises(ConfigError, match=f"'{kind}' cannot train experts here.*take 'zero2'"):
        objective_class(stage).create(stage, job, crowded(), None)
