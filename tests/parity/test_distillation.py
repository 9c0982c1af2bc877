"""Distillation against the published implementation of LLaVA-MoD, and against exact arithmetic where that
errs.

The vectors give logits. A head with the unit matrix turns hidden states into themselves, so that the chunked
losses can be fed with them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from mmpipe.losses import head
from mmpipe.losses.distillation import compose, distillation_loss, select_rows

VECTORS = Path(__file__).parents[1] / "fixtures" / "vectors" / "llava_mod"


def vector(name: str) -> dict:
    return json.loads((VECTORS / name).read_text())


@pytest.fixture(scope="module")
def masks() -> dict:
    return vector("01_kd_loss_mask.json")


def run(case: dict, *, student: torch.Tensor | None = None, labels: torch.Tensor | None = None, **options):
    inputs = case["inputs"]
    teacher = torch.tensor(inputs["teacher_logits"])
    student = torch.tensor(inputs["student_logits"]) if student is None else student
    unit = torch.eye(teacher.shape[-1])
    labels = torch.tensor(inputs["labels"]) if labels is None else labels
    mask = torch.tensor(inputs["attention_mask"])
    return distillation_loss(student, unit, teacher, unit, labels, attention_mask_BL=mask, **options)


@pytest.mark.parametrize(("tokens", "key"), [("response", "response_only"), ("all", "all_tokens")])
def test_reference_loss_and_gradient(masks: dict, tokens: str, key: str) -> None:
    student = torch.tensor(masks["inputs"]["student_logits"], requires_grad=True)
    loss, metrics = run(masks, student=student, tokens=tokens, compat="reference", chunk_bytes=4 * 6 * 4)
    assert loss.item() == pytest.approx(masks["expected"][key]["loss"], abs=1e-6)
    (grad,) = torch.autograd.grad(loss, student)
    expected = torch.tensor(masks["expected"][key]["grad_student_logits"])
    torch.testing.assert_close(grad, expected, atol=1e-6, rtol=1e-5)
    exact = masks["derived_not_upstream"][f"upstream_mask_{key}"]
    assert metrics["kl"].item() == pytest.approx(exact["forward_kl"], abs=1e-6)
    assert metrics["teacher_entropy"].item() == pytest.approx(exact["teacher_entropy"], abs=1e-6)


@pytest.mark.parametrize(("tokens", "key"), [("response", "shifted_response_only"), ("all", "shifted_all_nonpad")])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_default_reads_the_positions_that_predict(masks: dict, tokens: str, key: str, divergence: str) -> None:
    exact = masks["derived_not_upstream"][key]
    loss, metrics = run(masks, tokens=tokens, divergence=divergence)
    assert loss.item() == pytest.approx(exact[divergence], abs=1e-6)
    assert metrics["kl"].item() == pytest.approx(exact["forward_kl"], abs=1e-6)
    assert metrics["teacher_entropy"].item() == pytest.approx(exact["teacher_entropy"], abs=1e-6)


@pytest.mark.parametrize(("tokens", "key"), [("response", "response_only"), ("all", "all_tokens")])
def test_student_logits_of_minus_infinity(masks: dict, tokens: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = vector("02_kd_edge_cases.json")
    student = torch.tensor(masks["inputs"]["student_logits"])
    for b, t, v in case["inputs"]["neg_inf_positions"]:
        student[b, t, v] = -math.inf
    labels = torch.tensor(masks["inputs"]["labels"])
    given_RV = student.flatten(0, 1)[select_rows(labels, None, tokens, "reference")]
    # a matrix product with an infinity is NaN, so the logits themselves are put in place of the product
    monkeypatch.setattr(head._Head, "logits", lambda self, rows: given_RV[rows].clone())
    hidden = torch.zeros_like(student).requires_grad_()
    loss, metrics = run(masks, student=hidden, tokens=tokens, compat="reference")
    assert loss.item() == pytest.approx(case["expected"]["neg_inf"][key], abs=1e-6)
    assert math.isfinite(metrics["kl"].item())
    (grad,) = torch.autograd.grad(loss, hidden)
    assert torch.isfinite(grad).all()
    assert grad.any()


def test_student_that_equals_its_teacher(masks: dict) -> None:
    case = vector("02_kd_edge_cases.json")["expected"]["student_equals_teacher"]
    teacher = torch.tensor(masks["inputs"]["teacher_logits"])
    for tokens, key in (("response", "response_only"), ("all", "all_tokens")):
        reference, _ = run(masks, student=teacher, tokens=tokens, compat="reference")
        assert reference.item() == pytest.approx(case[key], abs=1e-6)
        for divergence in ("forward_kl", "reverse_kl", "jsd"):
            loss, _ = run(masks, student=teacher, tokens=tokens, divergence=divergence)
            assert loss.item() == pytest.approx(0, abs=1e-6)


def test_no_supervised_token_is_zero_where_the_reference_is_nan(masks: dict) -> None:
    expected = vector("02_kd_edge_cases.json")["expected"]["all_labels_ignored"]
    assert expected["response_only"] == "NaN"
    labels = torch.full((2, 7), -100)
    student = torch.tensor(masks["inputs"]["student_logits"], requires_grad=True)
    loss, metrics = run(masks, student=student, labels=labels)
    assert loss.item() == 0
    assert metrics["kl"].item() == 0
    loss.backward()
    assert student.grad is not None
    assert not student.grad.any()
    everything, _ = run(masks, labels=labels, tokens="all", compat="reference")
    assert everything.item() == pytest.approx(expected["all_tokens"], abs=1e-6)


def test_vocabularies_of_real_size_are_cut_before_the_softmax() -> None:
    case = vector("03_kd_vocab_slice.json")
    t = torch.arange(1, 5, dtype=torch.float64)[:, None]
    U, V = 152064, 151936
    u = torch.arange(1, U + 1, dtype=torch.float64)
    v = u[:V]
    # a sine of a sum is a sum of products: heads of rank two and a constant reproduce the formula
    teacher_hidden = torch.stack([4 * (0.37 * t).sin(), 4 * (0.37 * t).cos(), 0 * t + 9], -1).reshape(1, 4, 3)
    teacher_head = torch.stack([(0.0013 * u).cos(), (0.0013 * u).sin(), (u > V).double()], -1)
    student_hidden = torch.stack([4 * (0.21 * t).cos(), -4 * (0.21 * t).sin()], -1).reshape(1, 4, 2)
    student_head = torch.stack([(0.0017 * v).cos(), (0.0017 * v).sin()], -1)
    labels = torch.tensor(case["inputs"]["labels"])
    for tokens, key in (("response", "response_only"), ("all", "all_tokens")):
        loss, metrics = distillation_loss(
            student_hidden, student_head, teacher_hidden, teacher_head, labels,
            tokens=tokens, vocabulary=V, compat="reference",
        )  # fmt: skip
        exact = case["derived_not_upstream"][key]
        assert loss.item() == pytest.approx(exact["cross_entropy"], abs=1e-7)
        assert loss.item() == pytest.approx(case["expected"][key], abs=case["tolerance"])
        assert metrics["kl"].item() == pytest.approx(exact["forward_kl"], abs=1e-7)


def test_total_loss_counts_router_losses_as_published() -> None:
    """Totals published with the reference run: distillation 2.262891, language modelling 2.537922, auxiliary
    0.0375."""
    distillation, language, auxiliary = (torch.tensor(x) for x in (2.262891, 2.537922, 0.0375))
    reference = compose("kd_lm", distillation, language, auxiliary, compat="reference")
    assert reference.item() == pytest.approx(4.875813, abs=1e-6)
    fixed = compose("kd_lm", distillation, language, auxiliary)
    assert fixed.item() == pytest.approx(4.875813 - 0.0375, abs=1e-6)
    only = compose("only_kd", distillation, language, auxiliary, compat="reference")
    assert only.item() == pytest.approx(2.300391, abs=1e-6)
    off = compose("kd_lm", distillation, language, auxiliary, compat="reference", count_auxiliary=False)
    assert off.item() == pytest.approx(4.875813 - 0.0375, abs=1e-6)
