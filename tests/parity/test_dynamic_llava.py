"""Predictors, training and generation against Dynamic-LLaVA's published code, run on synthetic weights and inputs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mmpipe.losses.sparsity import image_loss, text_loss
from mmpipe.models.sparsity.attention import masked_attention, masked_softmax
from mmpipe.models.sparsity.context import KEYWORD, PruningPass, TrainingPass
from mmpipe.models.sparsity.hooks import wrap
from mmpipe.models.sparsity.predictors import TextPredictor, VisionPredictor
from mmpipe.models.sparsity.segments import Segments
from mmpipe.models.sparsity.sparsifier import annealed, straight_through
from mmpipe.models.sparsity.spec import SparsitySettings

VECTORS = Path(__file__).parents[1] / "fixtures" / "vectors" / "dynamic_llava"
PREDICTORS = json.loads((VECTORS / "dyn_predictors.json").read_text())
MODEL = json.loads((VECTORS / "dyn_model.json").read_text())
IMAGE = 8
ONE = torch.tensor(1)


def fill(named: dict[str, Tensor], overrides: dict[str, float] | None = None, amplitude: float = 0.2) -> None:
    """The vectors' rule for weights: a sine of place and rank of the name."""
    for rank, name in enumerate(sorted(named)):
        tensor = named[name]
        wave = torch.sin(0.7 * torch.arange(tensor.numel(), dtype=torch.float64) + rank).view(tensor.shape)
        scale = tensor.ndim == 1 and name.endswith("weight")
        amp = 0.8 if overrides is not None and "predictor" in name else amplitude
        tensor.data.copy_(1 + 0.1 * wave if scale else amp * wave)
    for place, value in (overrides or {}).items():
        named[place.removesuffix("[0]")].data[0] = value


def cosine(step: float, shift: float, *shape: int) -> Tensor:
    return torch.cos(step * torch.arange(math.prod(shape), dtype=torch.float64) + shift).view(shape).float()


# ---- parts


def test_the_predictor_of_images() -> None:
    given = PREDICTORS["vision_predictor"]
    sizes = {key: given["cfg"][key] for key in ("d_model", "nhead", "dim_feedforward", "num_layers")}
    predictor = VisionPredictor(given["cfg"]["input_dim"], SparsitySettings(**sizes))
    named = dict(predictor.named_parameters())
    assert {name: list(p.shape) for name, p in named.items()} == given["shapes"]
    fill(named)
    x = cosine(0.3, 0, 2, 9, 24)
    torch.testing.assert_close(predictor(x), torch.tensor(given["logits_policy_ones"]), rtol=1e-4, atol=1e-6)
    weighed = predictor(x, torch.tensor(given["policy2"]))
    torch.testing.assert_close(weighed, torch.tensor(given["logits_policy2"]), rtol=1e-4, atol=1e-6)


def test_the_predictor_of_text() -> None:
    given = PREDICTORS["text_predictor"]
    predictor = TextPredictor(given["cfg"]["input_dim"], SparsitySettings(d_model=given["cfg"]["d_model"], nhead=4))
    named = dict(predictor.named_parameters())
    assert {name: list(p.shape) for name, p in named.items()} == given["shapes"]
    fill(named)
    torch.testing.assert_close(
        predictor(cosine(0.41, 0.2, 2, 5, 24)), torch.tensor(given["logits"]), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("width", [4096, 5120, 2048])
def test_numbers_of_parameters(width: int) -> None:
    expected = PREDICTORS["param_counts_d512"][str(width)]
    with torch.device("meta"):
        vision, text = (kind(width, SparsitySettings()) for kind in (VisionPredictor, TextPredictor))
    assert sum(p.numel() for p in vision.parameters()) == expected["vision"]
    assert sum(p.numel() for p in text.parameters()) == expected["text"]


def test_masked_softmax() -> None:
    given = PREDICTORS["softmax_with_policy"]
    scores = 3 * cosine(0.9, 0, 2, 2, 5, 5)
    causal = torch.ones(2, 5, 5).tril().bool()
    ours = masked_softmax(scores, torch.tensor(given["policy"]), causal)
    torch.testing.assert_close(ours, torch.tensor(given["out"]), rtol=0, atol=1e-6)
    assert ours[~causal[:, None].expand_as(ours)].abs().max() == 0, "a later token leaks in"


def test_masked_attention() -> None:
    given = PREDICTORS["sdpa_with_policy"]
    q, k, v = (cosine(step, shift, *given["shape"]) for step, shift in ((0.31, 0), (0.53, 1), (0.77, 2)))
    causal = torch.ones(2, 1, 5, 5).tril().bool()
    policy = torch.tensor(given["policy"])
    ours, _ = masked_attention(nn.Identity(), q, k, v, causal, scaling=0.5, key_policy=policy)
    torch.testing.assert_close(ours.transpose(1, 2), torch.tensor(given["out"]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("run", PREDICTORS["gumbel"]["runs"], ids=lambda run: f"tau {run['tau']}")
def test_straight_through(run: dict[str, Any]) -> None:
    logits = torch.tensor(PREDICTORS["gumbel"]["log_probs"], requires_grad=True)
    keep = straight_through(logits, torch.tensor(run["noise"]), run["tau"])
    assert keep.round().tolist() == run["keep"]
    (keep * torch.tensor(run["grad_weight"])).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor(run["grad_logits"]), rtol=1e-4, atol=1e-6)


def test_temperatures() -> None:
    for row in PREDICTORS["tau_schedule"]:
        ours = annealed(row["step"] / row["total"], 1.0, 0.1)
        assert ours == pytest.approx(row["tau"], rel=1e-6)


@pytest.mark.parametrize("row", MODEL["mask_loss"], ids=lambda row: row["kind"])
def test_mask_losses(row: dict[str, Any]) -> None:
    masks = [torch.tensor(mask, dtype=torch.float32) for mask in row["masks"]]
    number = torch.tensor(len(masks))
    if row["kind"] == "vision":
        loss = image_loss(torch.stack(masks), row["target"], number)
    else:
        rows = torch.tensor([i for i, mask in enumerate(masks) for _ in mask])
        loss = text_loss(torch.cat(masks), rows, row["target"], row["len_for_training"], number)
    assert loss.item() == pytest.approx(row["loss"], abs=1e-6)


# ---- the whole model


def model(case: dict[str, Any], **changes: object) -> tuple[LlamaForCausalLM, SparsitySettings]:
    """The vectors' tiny model with the predictors of a case."""
    sparse = MODEL["sparse_config"] | case.get("sparse_config_override", {}) | changes
    if not sparse.pop("use_text_predictor"):
        sparse |= {"use_output_text_predictor": False, "use_instruct_predictor": False}
    del sparse["mask_loss_weight"]
    settings = SparsitySettings(**sparse)
    config = MODEL["llama_config"]
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    llama = LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in config.items() if k != "rope_theta"}, rope_parameters=rope)
    )
    wrap(llama.model, settings, IMAGE)
    named = {name.replace("sparsifier.", ""): p for name, p in llama.named_parameters()}
    overrides = case.get("bias_override_after_fill", MODEL["bias_override_after_fill"])
    fill(
        named, {place: value for place, value in overrides.items() if not changes or place.removesuffix("[0]") in named}
    )
    return llama.eval(), settings


def ranges(rows: list[dict[str, list[int]]], name: str, length: int) -> Tensor:
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, segments in zip(mask, rows, strict=True):
        row[slice(*segments[name])] = True
    return mask


TRAINING = {case["name"]: case for case in MODEL["training"]}


def training(case: dict[str, Any], **changes: object) -> tuple[LlamaForCausalLM, dict[str, Tensor], TrainingPass]:
    """Model, losses and pass of a training vector; ``changes`` switch predictors off, the weights stay."""
    llama, settings = model(case, **changes)
    if changes:
        llama.load_state_dict(model(case)[0].state_dict(), strict=False)
    llama.train()
    lengths, rows = case["attention_mask_lens"], case["segments"]
    longest = max(lengths)
    embeddings = cosine(0.37, 0.5, len(rows), longest, 32)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    embeddings = embeddings * mask[..., None]
    names = {"images": "image", "answers": "answer", "questions": "last_instruct"}
    segments = Segments(*(ranges(rows, name, longest) for name in names.values()))
    noise = torch.zeros(len(rows), longest, 2)
    for (name, key), call in zip(names.items(), case["gumbel_calls"], strict=False):
        padded = torch.tensor(call["noise"])
        kept = torch.arange(padded.shape[1]) < torch.tensor([b - a for a, b in (r[key] for r in rows)])[:, None]
        noise[getattr(segments, f"{name}_BL")] = padded[kept]
    current = TrainingPass(segments, noise, case["tau"], case["tau"])
    hidden = llama.model(
        inputs_embeds=embeddings, attention_mask=mask.long(), use_cache=False, **{KEYWORD: current}
    ).last_hidden_state
    places = torch.arange(longest)
    labels = torch.stack([(7 * places + 3 * b) % 64 for b in range(len(rows))])
    labels = labels.masked_fill(~segments.answers_BL, -100)
    logits = llama.lm_head(hidden)
    ce = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    number = torch.tensor(len(rows))
    losses = {"ce": ce}
    if "images" in current.decisions:
        losses["images"] = image_loss(current.decisions["images"].view(-1, IMAGE), settings.vision_keep_rate, number)
    for name, mask_BL, rate, least in (
        ("answers", segments.answers_BL, settings.output_text_keep_rate, settings.output_text_len_for_training),
        ("questions", segments.questions_BL, settings.instruct_keep_rate, settings.instruct_len_for_training),
    ):
        if name in current.decisions:
            row_T = mask_BL.nonzero()[:, 0]
            losses[name] = text_loss(current.decisions[name], row_T, rate, least, number)
    return llama, {"logits": logits, **losses}, current


@pytest.mark.parametrize("name", [n for n in TRAINING if n != "empty_answer_gives_nan"])
def test_training(name: str) -> None:
    case = TRAINING[name]
    llama, given, current = training(case)
    logits, ce = given.pop("logits"), given.pop("ce")
    for (segment, keep), call in zip(current.decisions.items(), case["gumbel_calls"], strict=True):
        key = {"images": "image", "answers": "answer", "questions": "last_instruct"}[segment]
        lengths = [b - a for a, b in (row[key] for row in case["segments"])]
        expected = [v for row, n in zip(call["keep"], lengths, strict=True) for v in row[:n]]
        assert keep.round().tolist() == expected, segment
    mask_loss = 100.0 * sum(given.values())
    assert ce.item() == pytest.approx(case["ce"], rel=1e-5)
    assert mask_loss.item() == pytest.approx(case["mask_loss_total"], rel=1e-5)
    assert (ce + mask_loss).item() == pytest.approx(case["loss"], rel=1e-5)
    expected_logits = torch.tensor(case["logits_last_two_positions"])
    # at padding, the published code looks at padding
    real = torch.arange(logits.shape[1])[-2:] < torch.tensor(case["attention_mask_lens"])[:, None]
    ours = logits[:, -2:, : expected_logits.shape[-1]]
    torch.testing.assert_close(ours[real], expected_logits[real], rtol=1e-4, atol=1e-5)
    (ce + mask_loss).backward()
    gradients = {name.replace("sparsifier.", ""): p.grad for name, p in llama.named_parameters()}
    for parameter, norm in case["grad_norms"].items():
        assert gradients[parameter] is not None, parameter
        assert gradients[parameter].norm().item() == pytest.approx(norm, rel=2e-4, abs=1e-6), parameter


@pytest.mark.parametrize("name", ["b1_long_answer", "b2_short_and_long", "b2_low_tau"])
def test_text_is_sparsified_without_images_as_beside_them(name: str) -> None:
    """The published code decides about answers before images are pruned: without them the decisions are the same."""
    case = TRAINING[name]
    _, both, _ = training(case)
    _, alone, current = training(case, use_vision_predictor=False)
    assert current.decisions.keys() == {"answers"}
    lengths = [b - a for a, b in (row["answer"] for row in case["segments"])]
    expected = [v for row, n in zip(case["gumbel_calls"][1]["keep"], lengths, strict=True) for v in row[:n]]
    assert current.decisions["answers"].round().tolist() == expected
    total = 100 * (both["images"] + alone["answers"])
    assert total.item() == pytest.approx(case["mask_loss_total"], rel=1e-5)
    assert not torch.allclose(both["logits"], alone["logits"]), "all image tokens are retained"


def test_an_empty_answer_costs_nothing_where_the_published_loss_is_not_a_number() -> None:
    case = TRAINING["empty_answer_gives_nan"]
    assert case["loss"] == "nan"
    _, given, _ = training(case)
    assert given["ce"].item() == pytest.approx(case["ce"], rel=1e-5)
    assert torch.isfinite(given["answers"])


# ---- generation

INFERENCE = {case["name"]: case for case in MODEL["inference"]}


def generation(case: dict[str, Any], rows: slice = slice(None)) -> list[dict[str, Any]]:
    """Feed a case's prompt and tokens to our model, for some of its rows; what it did at each step."""
    llama, _ = model(case)
    prompt, *steps = case["log"]
    # rows that are alike are listed once
    segments = (prompt["segments_in"] * case["B"])[: case["B"]][rows]
    length = segments[0]["answer"][0]
    embeddings = cosine(0.37, 0.5, case["B"], length, 32)[rows]
    done, cache = [], None
    for step in (prompt, *steps):
        if cache is None:
            current = PruningPass(ranges(segments, "image", length), is_prompt=True)
            given = {"inputs_embeds": embeddings}
        else:
            ids = torch.tensor(step["input_token"])[rows, None]
            current = PruningPass(torch.zeros_like(ids, dtype=torch.bool))
            given = {"input_ids": ids, "past_key_values": cache}
        with torch.no_grad():
            out = llama.model(**given, use_cache=True, **{KEYWORD: current})
        cache = out.past_key_values
        done.append(
            {
                "lengths": [layer.keys.shape[2] for layer in cache.layers],
                "true": current.slots.counts,
                "keep": current.keep_BL,
                "logits": llama.lm_head(out.last_hidden_state[:, -1]),
                "positions": current._positions_BM,
            }
        )
    return done


@pytest.mark.parametrize("name", [n for n in INFERENCE if INFERENCE[n]["B"] == 1])
def test_generation_row_by_row(name: str) -> None:
    case = INFERENCE[name]
    for number, (step, ours) in enumerate(zip(case["log"], generation(case), strict=True)):
        assert ours["lengths"] == step["cache_len"], number
        assert ours["true"] == step["true_len"][-1]
        if number == 0:
            assert ours["positions"][0].tolist() == step["kept_positions_layer2"]
        else:
            assert ours["positions"].tolist() == [[step["position"]]]
            if step["keep_decision"] is not None:
                assert ours["keep"][:, 0].tolist() == step["keep_decision"]
        expected = torch.tensor(step["last_logits"])
        torch.testing.assert_close(ours["logits"][:, : expected.shape[1]], expected, rtol=1e-4, atol=1e-5)
        assert ours["logits"].argmax(-1).tolist() == step["argmax"]


def test_a_batch_is_its_rows_where_the_published_one_attends_to_zeros() -> None:
    case = INFERENCE["b2_zero_padded_bug"]
    together = generation(case)
    alone = [generation(case, slice(row, row + 1)) for row in range(2)]
    for number, (step, ours) in enumerate(zip(case["log"], together, strict=True)):
        assert ours["lengths"] == step["cache_len"], number
        assert ours["true"] == step["true_len"][-1]
        rows = torch.cat([alone[0][number]["logits"], alone[1][number]["logits"]])
        torch.testing.assert_close(ours["logits"], rows, rtol=1e-4, atol=1e-5)
        # the row with the longer cache has no zeros to look at
        first = torch.tensor(step["last_logits"])[:1]
        torch.testing.assert_close(ours["logits"][:1, : first.shape[1]], first, rtol=1e-4, atol=1e-5)
