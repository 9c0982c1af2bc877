"""Distillation losses: divergences, chunks, cached teachers, vocabularies and their errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_llava import tokenizer

from mmpipe.errors import ArtifactError, ConfigError, DataError
from mmpipe.losses import positions
from mmpipe.losses.distillation import cached_distillation_loss, distillation_loss, jsd, sampled_distillation_loss
from mmpipe.losses.teacher import most_probable_tokens, sample_tokens, shared_rows

LABELS = torch.tensor([[-100, -100, 3, 4, 8, -100], [-100, 7, -100, -100, -100, -100]])


@pytest.fixture
def pair() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "student_hidden_BLD": normal(2, 6, 4).requires_grad_(),
        "student_head_VD": normal(9, 4).requires_grad_(),
        "teacher_hidden_BLE": normal(2, 6, 5),
        "teacher_head_UE": normal(9, 5),
    }


def log_probabilities(pair: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    rows, _ = positions.response(LABELS)
    p = (pair["teacher_hidden_BLE"] @ pair["teacher_head_UE"].T).flatten(0, 1)[rows].log_softmax(-1)
    q = (pair["student_hidden_BLD"] @ pair["student_head_VD"].T).flatten(0, 1)[rows].log_softmax(-1)
    return p, q


def gradients(loss: torch.Tensor, pair: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, (pair["student_hidden_BLD"], pair["student_head_VD"]))


@pytest.mark.parametrize("chunk_bytes", [1, 10**6])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_divergences_equal_plain_formulas(pair: dict, divergence: str, chunk_bytes: int) -> None:
    log_p, log_q = log_probabilities(pair)
    log_m = (0.3 * log_p.exp() + 0.7 * log_q.exp()).log()

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.kl_div(b, a, log_target=True, reduction="batchmean")

    plain = {
        "forward_kl": kl(log_p, log_q),
        "reverse_kl": kl(log_q, log_p),
        "jsd": 0.3 * kl(log_p, log_m) + 0.7 * kl(log_q, log_m),
    }[divergence]
    loss, metrics = distillation_loss(
        **pair, labels_BL=LABELS, divergence=divergence, jsd_weight=0.3, chunk_bytes=chunk_bytes
    )
    torch.testing.assert_close(loss, plain)
    for ours, theirs in zip(gradients(loss, pair), gradients(plain, pair), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(metrics["kl"], kl(log_p, log_q).detach())
    torch.testing.assert_close(metrics["teacher_entropy"], -(log_p.exp() * log_p).sum(-1).mean())


@pytest.mark.parametrize("tokens", ["response", "all"])
@pytest.mark.parametrize("length", [5, 7])
def test_a_teacher_with_other_positions_is_refused(pair: dict, tokens: str, length: int) -> None:
    labels = torch.full((2, length), 1)
    teacher = pair | {"teacher_hidden_BLE": torch.randn(2, length, 5, dtype=torch.float64)}
    with pytest.raises(DataError, match=r"positions to distil in this batch, the student"):
        distillation_loss(
            **teacher,
            labels_BL=LABELS,
            attention_mask_BL=torch.ones(2, 6),
            teacher_labels_BM=labels,
            teacher_attention_mask_BM=torch.ones(2, length),
            tokens=tokens,
        )


def test_jensen_shannon_is_bounded() -> None:
    log_p = torch.tensor([[50.0, 0.0]]).log_softmax(-1)
    log_q = torch.tensor([[0.0, 50.0]]).log_softmax(-1)
    assert jsd(log_p, log_q).item() == pytest.approx(math.log(2), rel=1e-6)


def test_temperature_keeps_the_size_of_the_gradient(pair: dict) -> None:
    norms = []
    for temperature in (20.0, 40.0):
        loss, metrics = distillation_loss(**pair, labels_BL=LABELS, temperature=temperature)
        norms.append(gradients(loss, pair)[0].norm().item())
        torch.testing.assert_close(loss.detach(), metrics["kl"] * temperature**2)
    assert norms[0] == pytest.approx(norms[1], rel=0.1)
    with pytest.raises(ConfigError, match="positive"):
        distillation_loss(**pair, labels_BL=LABELS, temperature=0)


def test_padding_is_never_distilled(pair: dict) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    loss, _ = distillation_loss(**pair, labels_BL=LABELS, attention_mask_BL=mask, tokens="all")
    (grad,) = torch.autograd.grad(loss, pair["student_hidden_BLD"])
    assert not grad[1, 2:].any(), "position 2 would predict padding"
    assert grad[1, 1].any()
    assert not grad[0, 5].any()


def test_micro_batches_add_up_under_one_normaliser(pair: dict) -> None:
    whole, _ = distillation_loss(**pair, labels_BL=LABELS)
    parts = []
    for i in range(2):
        half = {k: v[i : i + 1] if k.endswith(("BLD", "BLE")) else v for k, v in pair.items()}
        parts.append(distillation_loss(**half, labels_BL=LABELS[i : i + 1], denominator=4)[0])
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_teacher_is_named(pair: dict, bad: float) -> None:
    pair["teacher_hidden_BLE"][0, 2, 0] = bad
    with pytest.raises(ArtifactError, match="teacher's logits are not finite"):
        distillation_loss(**pair, labels_BL=LABELS)


def test_a_broken_student_stays_visible(pair: dict) -> None:
    pair["student_hidden_BLD"].data[0, 2, 0] = math.nan
    loss, _ = distillation_loss(**pair, labels_BL=LABELS)
    assert loss.isnan()


def test_heads_of_other_sizes_need_an_agreement(pair: dict) -> None:
    pair["teacher_head_UE"] = torch.cat([pair["teacher_head_UE"], torch.full((2, 5), 50.0, dtype=torch.float64)])
    with pytest.raises(ConfigError, match="9 rows, the teacher's 11"):
        distillation_loss(**pair, labels_BL=LABELS)
    with pytest.raises(ConfigError, match="10 shared rows do not fit"):
        distillation_loss(**pair, labels_BL=LABELS, vocabulary=10)
    padded, _ = distillation_loss(**pair, labels_BL=LABELS, vocabulary=9)
    pair["teacher_head_UE"] = pair["teacher_head_UE"][:9]
    torch.testing.assert_close(padded, distillation_loss(**pair, labels_BL=LABELS)[0])


def cached(pair: dict, k: int, **options):
    ids, log_p = log_probabilities(pair)[0].detach().topk(k)[::-1]
    student = {name: pair[name] for name in ("student_hidden_BLD", "student_head_VD")}
    return cached_distillation_loss(**student, labels_BL=LABELS, teacher_ids_RK=ids,
                                    teacher_log_probabilities_RK=log_p, **options)  # fmt: skip


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "drop"])
def test_a_complete_cache_is_the_live_teacher(pair: dict, tail: str) -> None:
    live, _ = distillation_loss(**pair, labels_BL=LABELS)
    loss, metrics = cached(pair, 9, tail=tail)
    torch.testing.assert_close(loss, live, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(gradients(loss, pair), gradients(live, pair), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert metrics["teacher_residual"].item() == pytest.approx(0, abs=1e-6)


def test_the_bucket_bounds_the_divergence_from_below(pair: dict) -> None:
    live = distillation_loss(**pair, labels_BL=LABELS)[0].item()
    bounds = [cached(pair, k)[0].item() for k in (1, 3, 5, 8)]
    assert bounds == sorted(bounds)
    assert 0 < bounds[0] < bounds[-1] < live + 1e-6
    assert cached(pair, 3)[1]["teacher_residual"].item() > 0.01


def test_only_the_bucket_is_zero_for_the_teacher_itself(pair: dict) -> None:
    pair["student_hidden_BLD"], pair["student_head_VD"] = pair["teacher_hidden_BLE"], pair["teacher_head_UE"]
    assert cached(pair, 3, tail="bucket")[0].item() == pytest.approx(0, abs=1e-6)
    assert cached(pair, 3, tail="renormalise")[0].item() > 0.01


def test_a_cache_for_other_labels_is_refused(pair: dict) -> None:
    student = {name: pair[name] for name in ("student_hidden_BLD", "student_head_VD")}
    with pytest.raises(DataError, match="3 positions for this batch, its labels supervise 4"):
        cached_distillation_loss(
            **student,
            labels_BL=LABELS,
            teacher_ids_RK=torch.zeros(3, 2, dtype=torch.long),
            teacher_log_probabilities_RK=torch.full((3, 2), -1.0),
        )
    with pytest.raises(ArtifactError, match="not finite"):
        cached_distillation_loss(
            **student,
            labels_BL=LABELS,
            teacher_ids_RK=torch.zeros(4, 2, dtype=torch.long),
            teacher_log_probabilities_RK=torch.full((4, 2), -math.inf),
        )


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "drop"])
@pytest.mark.parametrize("sharpness", [0.5, 2.0])
def test_half_precision_is_enough_for_cached_log_probabilities(tail: str, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, noise = torch.randn(2, 1, 65, 64, generator=generator)
    head = torch.randn(4096, 64, generator=generator) * sharpness
    labels = torch.ones(1, 65, dtype=torch.long)
    ids, log_p = most_probable_tokens(teacher, head, labels, 64)
    student = teacher + 0.2 / sharpness * noise
    exact, half = (
        cached_distillation_loss(student, head, labels, ids, values, tail=tail)[0] for values in (log_p, log_p.half())
    )
    assert exact > 0.05
    torch.testing.assert_close(half, exact, rtol=1e-3, atol=0)


def test_draws_estimate_the_divergence_without_bias(pair: dict) -> None:
    log_p = log_probabilities(pair)[0].detach()
    ids = torch.multinomial(log_p.exp(), 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    loss, _ = sampled_distillation_loss(
        pair["student_hidden_BLD"], pair["student_head_VD"], LABELS, ids, log_p.gather(1, ids)
    )
    live, _ = distillation_loss(**pair, labels_BL=LABELS)
    torch.testing.assert_close(loss, live, atol=0.03, rtol=0)
    for ours, theirs in zip(gradients(loss, pair), gradients(live, pair), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.03, rtol=0)


def test_draws_with_weights_equal_repeated_draws(pair: dict) -> None:
    log_p = log_probabilities(pair)[0].detach()
    student = pair["student_hidden_BLD"], pair["student_head_VD"], LABELS
    repeated = torch.tensor([[2, 2, 5, 2]]).expand(4, 4)
    merged = torch.tensor([[2, 5]]).expand(4, 2)
    one, _ = sampled_distillation_loss(*student, repeated, log_p.gather(1, repeated))
    other, _ = sampled_distillation_loss(
        *student, merged, log_p.gather(1, merged), torch.tensor([[0.75, 0.25]]).expand(4, 2)
    )
    torch.testing.assert_close(one, other)


def test_what_a_teacher_leaves_behind(pair: dict) -> None:
    log_p = log_probabilities(pair)[0].detach()
    teacher = pair["teacher_hidden_BLE"], pair["teacher_head_UE"], LABELS
    ids, values = most_probable_tokens(*teacher, 3)
    expected = log_p.topk(3)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(values, expected.values.float())
    fewer, _ = most_probable_tokens(*teacher, 3, vocabulary=4)
    assert fewer.max() < 4

    ids, values = sample_tokens(*teacher, 20_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(values, log_p.gather(1, ids).float())
    shares = torch.stack([torch.bincount(row, minlength=9) for row in ids]) / 20_000
    torch.testing.assert_close(shares.double(), log_p.exp(), atol=0.02, rtol=0)

    with pytest.raises(ConfigError, match="10 tokens a position, of a vocabulary of 9"):
        most_probable_tokens(*teacher, 10)
    pair["teacher_head_UE"][0, 0] = math.nan
    with pytest.raises(ArtifactError, match="not finite"):
        most_probable_tokens(*teacher, 3)


def test_shared_vocabulary_ignores_padding_rows_only() -> None:
    student, teacher = tokenizer(), tokenizer()
    assert shared_rows(student, teacher, 272, 320) == 272
    teacher.add_tokens(["<extra>"])
    with pytest.raises(ConfigError, match=r"1 ids differ.*nothing / '<extra>'"):
        shared_rows(student, teacher, 272, 320)
    with pytest.raises(ConfigError, match="do not share a vocabulary"):
        shared_rows(student, tokenizer(), 100, 320)
