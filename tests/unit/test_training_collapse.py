"""Collapse is seen while a model trains: in the log, in the history, and in the curves."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tiny_llava import batch, llava

from mmpipe.models.moe.spec import MoESettings
from mmpipe.models.moe.upcycle import upcycle
from mmpipe.training.progress import LAYERS, CollapseWatch


def sparse(router: str = "topk") -> Any:
    settings = MoESettings(experts=4, top_k=2, placement="dense", router=router)
    return upcycle(llava(layers=2), settings).train()


def collapse(model: Any, layer: int) -> None:
    """Let every token of a layer choose the same experts: of equal scores the first ones win."""
    with torch.no_grad():
        model.model.language_model.layers[layer].mlp.router.weight.zero_()


def test_a_collapsed_layer_is_named_once_and_so_is_its_recovery(caplog: pytest.LogCaptureFixture) -> None:
    model, watch, given = sparse(), CollapseWatch(), batch()
    weight = model.model.language_model.layers[1].mlp.router.weight
    healthy = weight.detach().clone()
    caplog.set_level(logging.INFO)

    def step(number: int) -> dict[str, float]:
        for _ in range(2):  # micro batches
            model(**given)
            watch.add(model)
        return watch.metrics(number)

    first = step(1)
    assert first[LAYERS] == 0
    assert 0 < first["routing.language_model.top_set"] <= 0.5
    assert not caplog.messages
    collapse(model, 1)
    assert step(2) == {"routing.language_model.top_set": 1.0, LAYERS: 1.0}
    assert step(3)[LAYERS] == 1
    (message,) = caplog.messages
    assert "step 2" in message
    assert "language_model.layers.1.mlp has collapsed: 100 %" in message
    with torch.no_grad():
        weight.copy_(healthy)
    assert step(4)[LAYERS] == 0
    assert "recovered" in caplog.messages[-1]


def test_choices_that_do_nothing_are_a_choice_of_their_own() -> None:
    model, watch = sparse("tcmoe"), CollapseWatch()
    router = model.model.language_model.layers[0].mlp.router
    with torch.no_grad():
        router.weight.zero_()
    model(**batch())
    watch.add(model)
    assert watch.metrics(1)["routing.language_model.top_set"] == 1.0


def test_a_dense_model_logs_nothing() -> None:
    model, watch = llava(), CollapseWatch()
    model(**batch())
    watch.add(model)
    assert watch.metrics(1) == {}
