"""The MoE layer: its arithmetic, its masks, its losses under checkpointing, and the errors of routers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_llava import batch, llava
from torch import Tensor, nn

from mmpipe.errors import ConfigError
from mmpipe.models.moe.collect import collect_losses, collect_statistics, moe_layers
from mmpipe.models.moe.context import ForwardPass
from mmpipe.models.moe.experts import ExpertsConfig, SwiGLUExperts, loop
from mmpipe.models.moe.layer import MoELayer
from mmpipe.models.moe.routers.base import BaseRouter, RouterError, Routing, build
from mmpipe.models.moe.spec import MoESettings
from mmpipe.models.moe.upcycle import upcycle
from mmpipe.models.schedule import set_progress


class Fixed(BaseRouter):
    """A router that gives what it is told."""

    result: Routing
    seen: float = -1

    def reset_parameters(self, generator: torch.Generator) -> None:
        pass

    def forward(self, hidden_TD: Tensor, sequence_T: Tensor | None = None) -> Routing:
        return self.result

    def step(self, progress: float) -> None:
        self.seen = progress


def layer(dtype: torch.dtype = torch.float32, seed: int = 0, **settings: object) -> MoELayer:
    given = MoESettings(**settings)
    torch.manual_seed(seed)
    experts = SwiGLUExperts(ExpertsConfig(given.experts, 16, 24))
    router = build(given, 16)
    for parameter in (*experts.parameters(), *router.parameters()):
        nn.init.normal_(parameter, std=0.3)
    return MoELayer(experts, router, given).to(dtype).eval()


def plain(moe: MoELayer, x_TD: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    p_TN = F.linear(x_TD, moe.router.weight).softmax(1)
    rows = []
    for x_D, p_N in zip(x_TD, p_TN, strict=True):
        chosen = p_N.topk(moe.router.top_k).indices
        scale = p_N[chosen].sum() if moe.router.top_k > 1 else 1
        row = 0
        for e in chosen:
            gate, up = (moe.experts.gate_up_proj[e] @ x_D).chunk(2)
            row = row + p_N[e] / scale * (moe.experts.down_proj[e] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("backend", ["mmpipe_automatic", "grouped_mm", "batched_mm", "eager"])
def test_every_backend_equals_the_plain_sum(top_k: int, backend: str) -> None:
    moe = layer(top_k=top_k)
    moe.experts.config._experts_implementation = backend
    x = torch.randn(2, 5, 16, requires_grad=True)
    parameters = (x, moe.experts.gate_up_proj, moe.experts.down_proj, moe.router.weight)
    ours, expected = moe(x), plain(moe, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    for mine, theirs in zip(
        torch.autograd.grad(ours.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-3)


def test_double_precision_and_odd_sizes_take_the_loop() -> None:
    moe = layer(torch.float64)
    x = torch.randn(3, 4, 16, dtype=torch.float64)
    torch.testing.assert_close(moe(x), plain(moe, x.flatten(0, 1)).view_as(x), atol=1e-6, rtol=1e-6)
    odd = SwiGLUExperts(ExpertsConfig(3, 5, 7))
    for parameter in odd.parameters():
        nn.init.normal_(parameter)
    x, indices, weights = torch.randn(4, 5), torch.tensor([[0, 2]] * 4), torch.full((4, 2), 0.5)
    torch.testing.assert_close(odd(x, indices, weights), loop(odd, x, indices, weights))


def test_autocast_computes_experts_in_its_dtype() -> None:
    moe = layer()
    x = torch.randn(2, 5, 16)
    exact = moe(x)
    moe.forward_pass = ForwardPass.of_mask(torch.tensor([[1] * 5, [0] + [1] * 4]), 5)
    with torch.autocast("cpu", torch.bfloat16):
        output = moe(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float()[0], exact[0], atol=0.05, rtol=0.05)
    output.sum().backward()
    for parameter in moe.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.any()


def test_padding_is_neither_routed_nor_counted() -> None:
    moe = layer()
    x = torch.randn(2, 6, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    moe.forward_pass = ForwardPass.of_mask(mask, 6)
    output = moe(x)
    report = moe.forward_pass.reports[id(moe)]
    assert not output[1, :2].any()
    assert report.statistics["tokens"].item() == 10
    assert report.statistics["load"].sum().item() == 20

    moe.forward_pass = None
    whole = moe(x)
    torch.testing.assert_close(output[mask.bool()], whole[mask.bool()])
    alone = ForwardPass()
    moe.forward_pass = alone
    moe(x[mask.bool()][None])
    torch.testing.assert_close(report.losses["balance"], alone.reports[id(moe)].losses["balance"])


def test_the_reference_counts_padding() -> None:
    moe = layer(compat="reference")
    moe.forward_pass = current = ForwardPass.of_mask(torch.tensor([[1, 0, 0]]), 3)
    moe(torch.randn(1, 3, 16))
    assert current.reports[id(moe)].statistics["tokens"].item() == 3


@pytest.mark.parametrize(
    ("settings", "draws"),
    [
        ({"compat": "reference"}, True),
        ({"compat": "reference", "router_settings": {"compat": "fixed"}}, True),
        ({"compat": "fixed"}, False),
        ({"compat": "reference", "router_settings": {"compat": "reference"}}, False),  # LibMoE's
        ({"compat": "reference", "router_settings": {"second_choice": "most_likely"}}, False),
        ({"compat": "reference", "router": "sigmoid"}, False),
    ],
)
def test_one_switch_draws_the_second_expert_in_training(settings: dict, draws: bool) -> None:
    moe = layer(**settings)
    x = torch.randn(4, 16, 16)
    assert torch.equal(moe(x), moe(x)), "evaluation is deterministic"
    moe.train()
    assert torch.equal(moe(x), moe(x)) is not draws


def test_capacity_drops_in_training_only() -> None:
    moe = layer(capacity_factor=0.5, experts=4, top_k=2)
    x = torch.randn(1, 16, 16)
    moe.forward_pass = current = ForwardPass()
    dropless = moe(x)
    assert current.reports[id(moe)].statistics["dropped"].item() == 0
    moe.train().forward_pass = current = ForwardPass()
    dropped = moe(x)
    statistics = current.reports[id(moe)].statistics
    assert statistics["dropped"].item() > 0
    assert statistics["load"].max().item() <= 4
    assert not torch.allclose(dropped, dropless)


def test_a_token_that_lost_all_its_choices_is_zero() -> None:
    moe = layer(capacity_factor=0.5, experts=2, top_k=1).train()
    nn.init.zeros_(moe.router.weight)
    output = moe(torch.randn(1, 8, 16))
    assert output[0, :2].any(dim=1).all()
    assert not output[0, 2:].any(), "all eight tokens want expert 0, which has two slots"


def test_residual_mixes_with_the_dense_network() -> None:
    moe = layer()
    residual = MoELayer(moe.experts, moe.router, moe.settings, nn.Linear(16, 16))
    nn.init.zeros_(residual.mixture.weight)
    residual.mixture.bias.data = torch.tensor([0.0, torch.log(torch.tensor(3.0))])
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(residual(x), 0.25 * moe(x) + 0.75 * residual.dense(x))


@pytest.mark.parametrize(
    ("indices", "weights", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.long), torch.full((3, 2), 0.5), "shape .3, 2. for 4 tokens"),
        (torch.zeros(4, 2, dtype=torch.long), torch.full((4, 1), 1.0), "with weights of shape"),
        (torch.zeros(4, 2, dtype=torch.int32), torch.full((4, 2), 0.5), "int32"),
        (torch.full((4, 1), 4), torch.ones(4, 1), "experts 4 to 4 chosen, there are 0 to 3"),
        (torch.zeros(4, 1, dtype=torch.long), torch.full((4, 1), torch.nan), "not finite"),
        (torch.zeros(4, 2, dtype=torch.long), torch.full((4, 2), 0.4), "off by 0.2"),
        (torch.zeros(4, 5, dtype=torch.long), torch.full((4, 5), 0.2), "5 choices a token, with 4 experts"),
    ],
)
def test_what_a_router_may_not_do(indices: Tensor, weights: Tensor, message: str) -> None:
    moe = layer()
    moe.router = Fixed(16, 4, 2, None)
    moe.router.result = Routing(indices, weights)
    with pytest.raises(RouterError, match=message):
        moe(torch.randn(1, 4, 16))


def test_a_router_of_ones_own_by_import_path() -> None:
    settings = MoESettings(router=f"{__name__}:Fixed")
    assert isinstance(build(settings, 16), Fixed)
    with pytest.raises(ConfigError, match="is not a subclass"):
        build(MoESettings(router="torch.nn:Linear"), 16)
    with pytest.raises(ValueError, match=r"there is no module 'nowhere': put nowhere.py into"):
        MoESettings(router="nowhere:Router")
    with pytest.raises(ConfigError, match="second_choice"):
        build(MoESettings(router_settings={"second_choice": "sometimes"}), 16)
    with pytest.raises(ValueError, match="no router 'topkk'; did you mean 'topk'"):
        MoESettings(router="topkk")


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="top_k is 5, but there are only 4 experts"):
        MoESettings(top_k=5)
    with pytest.raises(ConfigError, match=r"layers 0 to 3, not \[4\]"):
        upcycle(llava(layers=4), MoESettings(placement=(0, 4)))
    with pytest.raises(ConfigError, match="twice"):
        upcycle(llava(layers=4), MoESettings(placement=(0, 0)))


def test_steps_reach_every_router() -> None:
    model = upcycle(llava(layers=2), MoESettings(router=f"{__name__}:Fixed"))
    set_progress(model, 0.25)
    assert [moe.router.seen for moe in moe_layers(model).values()] == [0.25]


def sparse_model(**settings: object) -> tuple[nn.Module, dict[str, Tensor]]:
    """A sparse model in training whose experts differ."""
    model = upcycle(llava(), MoESettings(**settings)).train()
    torch.manual_seed(5)
    for moe in moe_layers(model).values():
        for parameter in moe.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model, batch()


def step(model: nn.Module, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    out = model(**rows, use_cache=False)
    auxiliary, parts = collect_losses(model)
    return out.logits[rows["attention_mask"].bool()].square().mean() + 10 * auxiliary, parts


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_losses_are_counted_once_under_checkpointing() -> None:
    model, rows = sparse_model(capacity_factor=1.0, z_coefficient=0.1)
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    loss, parts = step(model, rows)
    again, its_parts = step(checkpointed, rows)
    assert set(parts) == {"balance", "z"}
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(its_parts, parts)
    loss.backward()
    again.backward()
    expected, got = gradients(model), gradients(checkpointed)
    assert any("router" in name and grad.any() for name, grad in expected.items())
    torch.testing.assert_close(got, expected)


def test_two_passes_before_one_backward_keep_their_masks() -> None:
    """A preference step: the second pass has other padding when the first is computed again."""
    model, rows = sparse_model()
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    others = batch(rows=3, padded=7, seed=9)
    for each in (model, checkpointed):
        (step(each, rows)[0] - 0.5 * step(each, others)[0]).backward()
    torch.testing.assert_close(gradients(checkpointed), gradients(model))


def test_reentrant_checkpointing_is_refused() -> None:
    model, rows = sparse_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model(**rows, use_cache=False)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        collect_losses(model)


def test_losses_sum_over_layers_and_statistics_name_them() -> None:
    model, rows = sparse_model(balance_coefficient=0.5)
    model(**rows, use_cache=False)
    total, parts = collect_losses(model)
    statistics = collect_statistics(model)
    assert list(statistics) == ["language_model.layers.0.mlp", "language_model.layers.2.mlp"]
    real = int(rows["attention_mask"].sum())
    for measured in statistics.values():
        assert measured["tokens"].item() == real
        assert measured["load"].sum().item() == 2 * real
        assert 0 < measured["entropy"].item() <= 1.3863
        assert 0 <= measured["margin"].item() <= 1
    assert parts["balance"].item() == pytest.approx(total.item())
    assert total.item() >= 0.5 * 2 * 0.9, "two layers, each near one or above"
    total.backward()
    assert all(moe.router.weight.grad.any() for moe in moe_layers(model).values())


def test_a_dense_model_has_no_losses() -> None:
    model = llava(layers=1)
    total, parts = collect_losses(model)
    assert total.item() == 0
    assert parts == {}
    assert collect_statistics(model) == {}


def test_left_padding_and_cached_decoding_do_not_change_answers() -> None:
    model, rows = sparse_model()
    model.eval()
    one = {name: value[:1] for name, value in rows.items()}
    pad = 4
    padded = {
        "input_ids": F.pad(one["input_ids"], (pad, 0), value=2),
        "attention_mask": F.pad(one["attention_mask"], (pad, 0), value=0),
        "pixel_values": one["pixel_values"],
    }
    plain_tokens = model.generate(**one, max_new_tokens=6, do_sample=False)[:, 14:]
    padded_tokens = model.generate(**padded, max_new_tokens=6, do_sample=False)[:, 14 + pad :]
    assert torch.equal(plain_tokens, padded_tokens)
    uncached = model.generate(**one, max_new_tokens=6, do_sample=False, use_cache=False)[:, 14:]
    assert torch.equal(plain_tokens, uncached)
