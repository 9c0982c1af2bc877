"""Choosing what trains by patterns of names."""

from __future__ import annotations

import pytest
from tiny_llava import llava

from mmpipe.errors import ConfigError
from mmpipe.models.trainable import learning_rate_groups, select


def test_only_what_matches_trains() -> None:
    model = llava(layers=2)
    names = select(model, ["language_model.*.mlp.*", "multi_modal_projector.*"])
    assert "language_model.layers.1.mlp.down_proj.weight" in names
    assert "multi_modal_projector.linear_2.bias" in names
    assert len(names) == 2 * 3 + 4
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {f"model.{name}" for name in names}

    select(model, ["lm_head.*"])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]


def test_a_pattern_that_matches_nothing_names_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"mlp\.w1.*matches no parameter.*nearest names: .*mlp"):
        select(llava(layers=1), ["language_model.layers.0.mlp.w1.weight"])


def test_a_tied_head_is_its_embedding() -> None:
    model = llava(layers=1, tie=True)
    names = select(model, ["lm_head.*"])
    assert names == ["language_model.embed_tokens.weight", "lm_head.weight"]
    groups = learning_rate_groups(model, base=1e-3, others={"lm_head.weight": 1e-5}, weight_decay=0.0)
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(1, 1e-5)]


def test_groups_by_rate_and_decay() -> None:
    model = llava(layers=1)
    select(model, ["multi_modal_projector.*", "language_model.norm.weight"])
    groups = learning_rate_groups(
        model, base=1e-3, others={"multi_modal_projector.*": 1e-4, "*.linear_2.*": 1e-5}, weight_decay=0.1
    )
    got = {(group["lr"], group["weight_decay"]): len(group["params"]) for group in groups}
    assert got == {(1e-3, 0.0): 1, (1e-4, 0.1): 1, (1e-4, 0.0): 1, (1e-5, 0.1): 1, (1e-5, 0.0): 1}


def test_learning_rate_patterns_must_match_and_something_must_train() -> None:
    model = llava(layers=1)
    select(model, ["lm_head.*"])
    with pytest.raises(ConfigError, match="matches no parameter"):
        learning_rate_groups(model, base=1e-3, others={"projector.*": 1e-4}, weight_decay=0.0)
    select(model, [])
    with pytest.raises(ConfigError, match="nothing trains"):
        learning_rate_groups(model, base=1e-3, others={}, weight_decay=0.0)
