"""Routers against LibMoE's published code: choices, weights, losses, outputs and gradients.

Experts there are two linear layers with biases and a GELU. Router tensors have other names; the tables below
translate.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmpipe import registry
from mmpipe.losses.routing import load_balancing_loss, z_loss
from mmpipe.models.moe.context import ForwardPass
from mmpipe.models.moe.experts import ExpertsConfig, MLPExperts
from mmpipe.models.moe.layer import MoELayer
from mmpipe.models.moe.routers.base import build
from mmpipe.models.moe.spec import ROUTERS, MoESettings

VECTORS = Path(__file__).parents[1] / "fixtures" / "vectors" / "libmoe"
GATE = {"gate.weight": "weight"}


@dataclass(frozen=True)
class Case:
    """A vector, the router that reproduces it, and their tensors: theirs -> ours."""

    vector: str
    router: str
    tensors: dict[str, str] = field(default_factory=lambda: GATE)
    settings: dict[str, Any] = field(default_factory=dict)
    progress: float = 0.0


HYPER = {
    "hyper_embedding": "embedding",
    "hypernet.0.weight": "inner_weight",
    "hypernet.0.bias": "inner_bias",
    "hypernet.2.weight": "outer_weight",
    "hypernet.2.bias": "outer_bias",
}
MOEPP = GATE | {"experts.7.wg.weight": "mixture", "experts.7.constant": "constant"}
REFERENCE = {"compat": "reference"}
CASES = [
    Case("v11_smoe", "topk"),
    Case("head_smoe", "topk"),
    Case("head_sigmoid", "sigmoid"),
    Case("v11_cosine", "cosine", GATE | {"gate.bias": "bias"}, REFERENCE),
    Case("v11_hyper_step3of10", "hyper", HYPER, REFERENCE, progress=0.3),
    Case("head_xmoe", "xmoe", {"expert_embeddings": "embeddings", "inp_reduction.weight": "reduction"}, REFERENCE),
    Case("head_share_v2", "shared"),
    Case("v20_remoe", "remoe"),
    Case("head_tcmoe", "tcmoe"),
    Case("head_tcmoe", "tcmoe", settings=REFERENCE),
    Case("head_moepp", "moepp", MOEPP),
    Case("head_moepp", "moepp", MOEPP, REFERENCE),
]


# ---- routers without a published vector, or for one setting only: the published formulas, token by token in float64

Choice = tuple[list[int], list[float]]


def best(scores: np.ndarray, k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda expert: -scores[expert])[:k]


def softmax(values: np.ndarray) -> np.ndarray:
    e = np.exp(values - values.max())
    return e / e.sum()


def sigmoid_reference(x: np.ndarray, w: dict[str, np.ndarray], k: int) -> Choice:
    """Sigmoid-R: ``p = softmax(sigmoid(W x + b))``, the k best, ``p / sum of the chosen p``."""
    p = softmax(1 / (1 + np.exp(-(w["weight"] @ x + w["bias"]))))
    chosen = best(p, k)
    return chosen, [p[i] / sum(p[chosen]) for i in chosen]


def shared_v3(x: np.ndarray, w: dict[str, np.ndarray], k: int) -> Choice:
    """SharedE-V3: the k - 1 best of ``sigmoid(W x)``, scaled to one, and the last expert; half of each."""
    s = 1 / (1 + np.exp(-w["weight"] @ x))
    chosen = best(s, k - 1)
    return [*chosen, len(s)], [*(0.5 * s[i] / sum(s[chosen]) for i in chosen), 0.5]


def hyper(x: np.ndarray, w: dict[str, np.ndarray], k: int) -> Choice:
    """Hyper-R: ``[W; b]`` from the hypernet, the k best logits, softmax over them."""
    inner = np.maximum(w["inner_weight"] @ w["embedding"][0] + w["inner_bias"], 0)
    made = (w["outer_weight"] @ inner + w["outer_bias"]).reshape(-1, len(x) + 1)
    logits = made[:, :-1] @ x + made[:, -1]
    chosen = best(logits, k)
    return chosen, softmax(logits[chosen]).tolist()


BY_FORMULA = {
    "sigmoid reference": (sigmoid_reference, "sigmoid", REFERENCE, "v11_smoe", 2, 0.0),
    "shared sigmoid, k 2": (shared_v3, "shared", {"scores": "sigmoid"}, "head_share_v2", 2, 0.0),
    "shared sigmoid, k 3": (shared_v3, "shared", {"scores": "sigmoid"}, "head_share_v2", 3, 0.0),
    "hyper, k 2": (hyper, "hyper", REFERENCE, "v11_hyper_step3of10", 2, 0.8),
    "hyper, k 3": (hyper, "hyper", REFERENCE, "v11_hyper_step3of10", 3, 0.8),
}


@pytest.mark.parametrize("name", BY_FORMULA)
def test_choices_weights_and_output_by_the_published_formula(name: str) -> None:
    formula, kind, options, vector, k, progress = BY_FORMULA[name]
    x = torch.tensor(load(vector)["inputs"]["x"]).flatten(0, 1)
    settings = MoESettings(experts=4, top_k=k, router=kind, router_settings=options)
    torch.manual_seed(4)
    router, experts = build(settings, x.shape[1]), MLPExperts(ExpertsConfig(4, x.shape[1], 16, "gelu"))
    tensors = dict(router.named_parameters()) | dict(router.named_buffers())
    for tensor in (*tensors.values(), *experts.parameters()):
        tensor.data = torch.randn_like(tensor)
    router.step(progress)
    layer = MoELayer(experts, router, settings).train()
    layer.forward_pass = ForwardPass()
    routing, output = router(x), layer(x)
    weights = {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}
    network = {name: parameter.detach().double() for name, parameter in experts.named_parameters()}
    for token, values in enumerate(x.double()):
        chosen, shares = formula(values.numpy(), weights, k)
        assert routing.indices_TK[token].tolist() == chosen
        assert routing.weights_TK[token].tolist() == pytest.approx(shares, rel=1e-5)
        expected = sum(
            share
            * (
                network["down_proj"][i]
                @ torch.nn.functional.gelu(network["up_proj"][i] @ values + network["up_proj_bias"][i])
                + network["down_proj_bias"][i]
            )
            for i, share in zip(chosen, shares, strict=True)
        )
        torch.testing.assert_close(output[token].double(), expected, atol=1e-4, rtol=1e-4)


def name_of(case: Case) -> str:
    return "-".join([case.vector, *case.settings.values()])


def load(name: str) -> dict:
    return json.loads((VECTORS / f"{name}.json").read_text())


def make(case: Case) -> tuple[dict, MoELayer]:
    vector = load(case.vector)
    given, weights = vector["settings"], vector["weights_before_forward"]
    settings = MoESettings(
        experts=given["num_experts"],
        top_k=given["top_k"],
        router=case.router,
        router_settings=case.settings,
        balance_coefficient=given["balance_loss_coef"],
        z_coefficient=given["router_z_loss_coef"],
        balance_within="sequence",
    )
    experts = MLPExperts(ExpertsConfig(given["num_experts"], given["D"], given["H"], "gelu"))
    router = build(settings, given["D"])
    ours = dict(router.named_parameters()) | dict(router.named_buffers())
    assert set(case.tensors.values()) == set(ours), "every tensor of the router is given"
    with torch.no_grad():
        for theirs, name in case.tensors.items():
            ours[name].copy_(torch.tensor(weights[theirs]).view_as(ours[name]))
        for part, names in {"0": ("up_proj", "up_proj_bias"), "2": ("down_proj", "down_proj_bias")}.items():
            for kind, name in zip(("weight", "bias"), names, strict=True):
                values = [weights[f"experts.{e}.{part}.{kind}"] for e in range(given["num_experts"])]
                getattr(experts, name).copy_(torch.tensor(values))
    router.step(case.progress)
    layer = MoELayer(experts, router, settings).train()
    layer.forward_pass = ForwardPass()
    return vector, layer


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_choices_and_weights(case: Case) -> None:
    vector, layer = make(case)
    expected = vector["expected"]
    routing = layer.router(torch.tensor(vector["inputs"]["x"]).flatten(0, 1))
    indices, weights = routing.indices_TK, routing.weights_TK
    if case.router == "shared":
        assert (indices[:, -1] == layer.router.experts - 1).all()
        indices, weights = indices[:, :-1], 2 * weights[:, :-1]
    theirs = torch.tensor(expected["topk_indices"]).flatten(0, 1)
    sizes = torch.tensor(expected["topk_weights"]).flatten(0, 1)
    if case.router == "tcmoe":
        rows = comparable(Case(case.vector, case.router), vector).flatten()
        indices, weights, theirs, sizes = indices[rows], weights[rows], theirs[rows], sizes[rows]
    if case.router == "tcmoe":  # theirs counts over both signs, and its weights have none
        weights, theirs = weights.abs(), theirs % layer.router.experts
    if case.router == "moepp":  # the experts that do not compute have no index of ours
        computes = theirs < layer.router.experts
        theirs, sizes = torch.where(computes, theirs, 0), sizes * computes
    assert torch.equal(indices, theirs)
    torch.testing.assert_close(weights, sizes, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_output_losses_and_gradients(case: Case) -> None:
    vector, layer = make(case)
    inputs, expected = vector["inputs"], vector["expected"]
    x = torch.tensor(inputs["x"]).requires_grad_()
    output = layer(x)
    report = layer.forward_pass.reports[id(layer)]
    theirs = torch.tensor(expected["output"])
    rows = comparable(case, vector)
    torch.testing.assert_close(output[rows], theirs[rows], atol=1e-5, rtol=1e-4)
    if case.router in ("tcmoe", "moepp") and not case.settings:
        return  # their balance losses are wrong: see the routers
    auxiliary = sum(report.losses.values())
    if "balance_loss" in expected:
        settings = vector["settings"]
        balance = report.losses["balance"] / settings["balance_loss_coef"]
        if case.router == "tcmoe":  # theirs is weighed already
            balance = report.losses["balance"]
        assert balance.item() == pytest.approx(expected["balance_loss"], rel=1e-5)
        z = report.losses["z"] / settings["router_z_loss_coef"]
        assert z.item() == pytest.approx(expected["z_loss"], rel=1e-5)
        assert auxiliary.item() == pytest.approx(expected["aux_loss"], rel=1e-5)
    ((output * torch.tensor(inputs["c"])).sum() + auxiliary).backward()
    theirs = torch.tensor(expected["grad_x"])
    if case.router == "tcmoe":  # what is lost forward has a gradient there
        whole = comparable(Case(case.vector, case.router), vector)
        torch.testing.assert_close(x.grad[whole], theirs[whole], atol=2e-5, rtol=1e-4)
        return
    torch.testing.assert_close(x.grad, theirs, atol=2e-5, rtol=1e-4)
    parameters = dict(layer.router.named_parameters())
    for name, gradient in expected["grad_router"].items():
        if case.tensors.get(name) in parameters:
            ours = parameters[case.tensors[name]].grad
            torch.testing.assert_close(ours, torch.tensor(gradient).view_as(ours), atol=2e-5, rtol=1e-4)


def comparable(case: Case, vector: dict) -> Tensor:
    """All tokens, but for TC-MoE those whose choices are of different experts: theirs loses repeated ones."""
    indices = torch.tensor(vector["expected"]["topk_indices"])
    if case.router != "tcmoe" or case.settings:
        return torch.ones(indices.shape[:2], dtype=torch.bool)
    experts = indices % vector["settings"]["num_experts"]
    return torch.tensor([[len(set(token.tolist())) == len(token) for token in row] for row in experts])


def test_the_later_cosine_router_is_the_sphere_router() -> None:
    vector = load("v20_cosine_gate_only")
    given, weights = vector["settings"], vector["weights_before_forward"]
    width = len(weights["inp_reduction.weight"][0])
    settings = MoESettings(experts=given["num_experts"], top_k=given["top_k"], router="xmoe", router_settings=REFERENCE)
    router = build(settings, width)
    router.embeddings.data = torch.tensor(weights["expert_embeddings"])
    router.reduction.data = torch.tensor(weights["inp_reduction.weight"])
    routing = router(torch.tensor(vector["inputs"]["x"]).flatten(0, 1))
    assert torch.equal(routing.indices_TK, torch.tensor(vector["expected"]["topk_indices"]).flatten(0, 1))
    theirs = torch.tensor(vector["expected"]["topk_weights"]).flatten(0, 1)
    torch.testing.assert_close(routing.weights_TK, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("case", load("losses")["cases"], ids=lambda case: f"{case['kind']}-{case['B']}x{case['N']}")
def test_losses_per_sequence(case: dict) -> None:
    logits = torch.tensor(case["gate_logits"])
    first = torch.tensor(case["selected_experts"])[..., 0].flatten()
    sequence = torch.arange(case["B"]).repeat_interleave(case["N"])
    p = torch.tensor(case["gate_softmax"]).flatten(0, 1)
    assert load_balancing_loss(p, first, sequence).item() == pytest.approx(case["balance_loss"], rel=1e-5)
    assert z_loss(logits.flatten(0, 1)).item() == pytest.approx(case["z_loss"], rel=1e-5)


FIXED = ["topk", "sigmoid", "cosine", "perturbed_cosine", "hyper", "xmoe", "shared"]


@pytest.mark.parametrize("router", registry.names(ROUTERS))
def test_equal_experts_give_the_dense_network_exactly_where_weights_add_up(router: str) -> None:
    settings = MoESettings(experts=4, top_k=2, router=router)
    torch.manual_seed(0)
    experts = MLPExperts(ExpertsConfig(4, 16, 24, "gelu"))
    for parameter in experts.parameters():
        parameter.data = torch.randn_like(parameter[:1]).expand_as(parameter).clone()
    layer = MoELayer(experts, build(settings, 16), settings).eval()
    layer.router.reset_parameters(torch.Generator().manual_seed(1))
    x = torch.randn(3, 7, 16)
    dense = experts(x.flatten(0, 1), torch.zeros(21, 1, dtype=torch.long), torch.ones(21, 1)).view_as(x)
    assert torch.allclose(layer(x), dense, atol=1e-4) == (router in FIXED)
    assert layer.router.normalised == (router in FIXED)


def test_fixed_cosine_does_not_collapse_to_equal_weights() -> None:
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    margins = {}
    for form in ("fixed", "reference"):
        router = build(MoESettings(router="cosine", router_settings={"compat": form}), 64)
        router.reset_parameters(torch.Generator().manual_seed(0))
        margins[form] = router(x).statistics["margin"].item()
    assert 3 * margins["reference"] < margins["fixed"]


def test_perturbed_cosine_moves_lengths_away_from_zero() -> None:
    settings = MoESettings(router="perturbed_cosine", router_settings={"compat": "reference"})
    router = build(settings, 8)
    router.reset_parameters(torch.Generator().manual_seed(0))
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    lengths = (x.norm(dim=1)[:, None] + 0.1) * (router.weight.norm(dim=1) + 0.1)
    scores = (x @ router.weight.T / lengths).softmax(1) + router.bias
    best, indices = scores.topk(2, dim=1)
    routing = router(x)
    assert torch.equal(routing.indices_TK, indices)
    torch.testing.assert_close(routing.weights_TK, best.softmax(1))


def test_free_experts_are_no_load() -> None:
    vector, layer = make(next(case for case in CASES if case.router == "moepp"))
    layer(torch.tensor(vector["inputs"]["x"]))
    statistics = layer.forward_pass.reports[id(layer)].statistics
    chosen = torch.tensor(vector["expected"]["topk_indices"]).flatten()
    assert statistics["load"].tolist() == torch.bincount(chosen, minlength=8)[:6].tolist()
    assert statistics["free"].item() == pytest.approx((chosen >= 6).float().mean().item())


def test_hyper_router_grows_its_choices_in_training_only() -> None:
    """``round((k - 1) * progress) + 1`` of the published code: half of a choice is rounded to even before one is added."""
    router = build(MoESettings(experts=4, top_k=3, router="hyper"), 8).train()
    router.reset_parameters(torch.Generator().manual_seed(0))
    x = torch.randn(5, 8)
    widths = []
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        router.step(progress)
        widths.append(router(x).indices_TK.shape[1])
    assert widths == [1, 1, 2, 3, 3]
    router.step(0.0)
    assert router.eval()(x).indices_TK.shape[1] == 3
    assert [name for name, _ in router.named_parameters()] == ["embedding"], "the hypernet does not train"
