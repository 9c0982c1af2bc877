"""Distillation: the student's next-token distribution learns from the teacher's.

With p the teacher's and q the student's distribution over the shared vocabulary, at temperature T:

* ``forward_kl``  KL(p || q) = sum p (log p - log q): mode-covering (mimic distillation, LLaVA-MoD);
* ``reverse_kl``  KL(q || p): mode-seeking;
* ``jsd``         w KL(p || m) + (1 - w) KL(q || m) with m = w p + (1 - w) q (generalised Jensen-Shannon).

Every divergence is multiplied by T^2, so that the size of its gradient does not depend on T (Hinton et al. 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mmpipe.errors import ArtifactError, ConfigError, DataError
from mmpipe.losses import CHUNK_BYTES, positions
from mmpipe.losses.head import RowValues, sum_over_rows

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd"]
DistilledTokens = Literal["response", "all"]
Compat = Literal["fixed", "reference"]
Tail = Literal["bucket", "renormalise", "drop"]
Losses = tuple[Tensor, dict[str, Tensor]]
"""A loss (scalar with gradient) and its detached metrics, divided like the loss."""

Divergence = Callable[[Tensor, Tensor, float], Tensor]
"""``(log_p_CV, log_q_CV, weight) -> values_C``."""


def select_rows(
    labels_BL: Tensor, attention_mask_BL: Tensor | None, tokens: DistilledTokens, compat: Compat = "fixed"
) -> Tensor:
    """The positions to distil, as indices into the batch flattened to B*L.

    ``response``: those that predict a supervised token. ``all``: those of real tokens that predict a real token. LLaVA-MoD
    (``reference``) takes the position *at* a supervised token instead, and for ``all`` every position, padding included.
    """
    if tokens == "response":
        return positions.response(labels_BL)[0] if compat == "fixed" else positions.unshifted(labels_BL)
    if compat == "reference":
        return torch.arange(labels_BL.numel(), device=labels_BL.device)
    mask_BL = torch.ones_like(labels_BL) if attention_mask_BL is None else attention_mask_BL
    return positions.every_token(mask_BL)


def distillation_loss(
    student_hidden_BLD: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_BLE: Tensor,
    teacher_head_UE: Tensor,
    labels_BL: Tensor,
    *,
    attention_mask_BL: Tensor | None = None,
    teacher_labels_BM: Tensor | None = None,
    teacher_attention_mask_BM: Tensor | None = None,
    divergence: DivergenceName = "forward_kl",
    temperature: float = 1.0,
    tokens: DistilledTokens = "response",
    vocabulary: int | None = None,
    jsd_weight: float = 0.5,
    denominator: Tensor | float | None = None,
    compat: Compat = "fixed",
    chunk_bytes: int = CHUNK_BYTES,
) -> Losses:
    """Divergence of the student from a teacher that ran on the same text.

    A teacher with another number of tokens per image has its own labels and mask. Both heads are applied to the chosen
    positions only, in chunks. ``vocabulary`` is the number of leading rows the heads share (:mod:`mmpipe.losses.vocabulary`),
    by default all. ``denominator`` defaults to the number of distilled positions; without any, loss and gradients are zero.
    A token with a student logit of -inf adds only its part of H(p).

    Metrics: ``kl``, KL(p || q) at the temperature, and ``teacher_entropy`` H(p). ``compat="reference"`` is LLaVA-MoD's loss:
    its positions, and the cross entropy H(p) + KL(p || q) as value, with the gradient of forward KL.

    Raises ConfigError for vocabularies that differ, DataError when the teacher has another number of chosen positions,
    ArtifactError when its logits are not finite.
    """
    if temperature <= 0:
        raise ConfigError(f"temperature must be positive, not {temperature}")
    if compat == "reference" and divergence != "forward_kl":
        raise ConfigError("the reference implementation knows forward_kl only")
    shared = _shared_rows(len(student_head_VD), len(teacher_head_UE), vocabulary)
    rows_R = teacher_rows_R = select_rows(labels_BL, attention_mask_BL, tokens, compat)
    if teacher_labels_BM is not None:
        teacher_rows_R = select_rows(teacher_labels_BM, teacher_attention_mask_BM, tokens, compat)
        _require_rows(len(teacher_rows_R), len(rows_R))
    student_RD = student_hidden_BLD.flatten(0, 1)[rows_R]
    student_SD = _leading(student_head_VD, shared)
    teacher_RE = teacher_hidden_BLE.detach().flatten(0, 1)[teacher_rows_R].to(teacher_head_UE.dtype)
    teacher_SE = _leading(teacher_head_UE.detach(), shared)
    settings = (divergence, temperature, jsd_weight, compat)
    values = _divergence_values(teacher_RE, teacher_SE, *settings)
    total, measured = sum_over_rows(student_RD, student_SD, values, chunk_bytes=chunk_bytes)
    if not torch.isfinite(total):
        # rare: tell the teacher's infinite logits, an error, from the student's, which are left out
        if not torch.isfinite(measured["teacher_entropy"]):
            raise ArtifactError(
                "the teacher's logits are not finite: its weights are damaged, or too large for their "
                "precision; run the teacher in float32 or bfloat16"
            )
        values = _divergence_values(teacher_RE, teacher_SE, *settings, leave_out_infinite=True)
        total, measured = sum_over_rows(student_RD, student_SD, values, chunk_bytes=chunk_bytes)
    return _divide(total, measured, ("kl", "teacher_entropy"), len(rows_R), denominator)


def _divergence_values(
    teacher_RE: Tensor,
    teacher_SE: Tensor,
    divergence: DivergenceName,
    temperature: float,
    jsd_weight: float,
    compat: Compat,
    leave_out_infinite: bool = False,
) -> RowValues:
    """The divergence of some rows as a function of the student's logits, and the metrics."""

    def values(logits_CV: Tensor, rows: slice) -> Losses:
        with torch.no_grad():
            teacher_CV = (teacher_RE[rows] @ teacher_SE.T).to(logits_CV.dtype)
            log_p_CV = apply_temperature(teacher_CV, temperature).log_softmax(1)
            entropy_C = -_dot(log_p_CV.exp(), log_p_CV)
        log_q_CV = apply_temperature(logits_CV, temperature).log_softmax(1)
        if leave_out_infinite:
            log_q_CV = log_q_CV.masked_fill(log_q_CV == -math.inf, 0.0)
        value_C = DIVERGENCES[divergence](log_p_CV, log_q_CV, jsd_weight)
        with torch.no_grad():
            kl_C = value_C if divergence == "forward_kl" else forward_kl(log_p_CV, log_q_CV)
        if compat == "reference":
            value_C = value_C + entropy_C
        return value_C * temperature**2, {"kl": kl_C, "teacher_entropy": entropy_C}

    return values


def cached_distillation_loss(
    student_hidden_BLD: Tensor,
    student_head_VD: Tensor,
    labels_BL: Tensor,
    teacher_ids_RK: Tensor,
    teacher_log_probabilities_RK: Tensor,
    *,
    tail: Tail = "bucket",
    denominator: Tensor | float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Losses:
    """Forward KL from the teacher's K most probable tokens of each response position.

    Rows are the positions that predict a supervised token, in order over the batch. The probabilities are those of the
    teacher's full softmax over the student's vocabulary; r is the residual mass that the K tokens do not cover:

    * ``bucket``       all other tokens form one: sum_k p_k (log p_k - log q_k) + r (log r - log(1 - sum_k q_k)). The KL of two
      coarsened distributions: at most the true KL, zero when it is, without a gradient on single tail tokens;
    * ``renormalise``  p_k / (1 - r) in place of p_k: biased towards a student without a tail;
    * ``drop``         the tail is left out of the sum: a pseudo-divergence that may be negative.

    Metrics: ``kl`` (the value) and ``teacher_residual``, the mean r.
    """
    rows_R, log_p_RK = _cached_rows(labels_BL, teacher_ids_RK, teacher_log_probabilities_RK)
    if not torch.isfinite(log_p_RK).all():
        raise ArtifactError("the cached teacher has log-probabilities that are not finite; make the cache again")
    residual_R = (1 - log_p_RK.exp().sum(1)).clamp_min(0)

    def values(logits_CV: Tensor, rows: slice) -> Losses:
        ids_CK, log_p_CK, residual_C = teacher_ids_RK[rows], log_p_RK[rows], residual_R[rows]
        total_C = logits_CV.logsumexp(1, keepdim=True)
        log_q_CK = logits_CV.gather(1, ids_CK) - total_C
        if tail == "renormalise":
            log_p_CK = log_p_CK - log_p_CK.logsumexp(1, keepdim=True)
        value_C = (log_p_CK.exp() * (log_p_CK - log_q_CK)).sum(1)
        if tail == "bucket" and ids_CK.shape[1] < logits_CV.shape[1]:
            rest_CV = logits_CV.scatter(1, ids_CK, -math.inf)
            log_rest_C = rest_CV.logsumexp(1) - total_C.squeeze(1)
            value_C = value_C + torch.xlogy(residual_C, residual_C) - residual_C * log_rest_C
        return value_C, {"kl": value_C, "teacher_residual": residual_C}

    student_RD = student_hidden_BLD.flatten(0, 1)[rows_R]
    total, measured = sum_over_rows(student_RD, student_head_VD, values, chunk_bytes=chunk_bytes)
    return _divide(total, measured, ("kl", "teacher_residual"), len(rows_R), denominator)


def sampled_distillation_loss(
    student_hidden_BLD: Tensor,
    student_head_VD: Tensor,
    labels_BL: Tensor,
    teacher_ids_RK: Tensor,
    teacher_log_probabilities_RK: Tensor,
    weights_RK: Tensor | None = None,
    *,
    denominator: Tensor | float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Losses:
    """Forward KL estimated from tokens sampled from the teacher's own distribution.

    ``sum_k w_k (log p_k - log q_k)``, with ``w_k`` the share of the samples that gave entry k (default 1/K: K samples with
    replacement, repeats listed). Unlike the K most probable tokens, samples estimate the KL and its gradient without bias
    (Anshumann et al. 2025, *Sparse Logit Sampling*). The value is noisy and may be negative.

    Metrics: ``kl``, the estimate.
    """
    rows_R, log_p_RK = _cached_rows(labels_BL, teacher_ids_RK, teacher_log_probabilities_RK)
    if weights_RK is None:
        weights_RK = torch.full_like(log_p_RK, 1 / log_p_RK.shape[1])

    def values(logits_CV: Tensor, rows: slice) -> Losses:
        log_q_CK = logits_CV.gather(1, teacher_ids_RK[rows]) - logits_CV.logsumexp(1, keepdim=True)
        value_C = (weights_RK[rows] * (log_p_RK[rows] - log_q_CK)).sum(1)
        return value_C, {"kl": value_C}

    student_RD = student_hidden_BLD.flatten(0, 1)[rows_R]
    total, measured = sum_over_rows(student_RD, student_head_VD, values, chunk_bytes=chunk_bytes)
    return _divide(total, measured, ("kl",), len(rows_R), denominator)


def compose(
    loss_type: Literal["only_kd", "kd_lm"],
    distillation: Tensor,
    language_modelling: Tensor,
    auxiliary: Tensor,
    *,
    compat: Compat = "fixed",
    count_auxiliary: bool = True,
) -> Tensor:
    """The total of a distillation stage: ``only_kd`` or ``kd_lm``, and the router losses once.

    In the reference the language-modelling loss of a sparse student already contains the router losses: with ``kd_lm`` they
    count twice when switched on and once when switched off.
    """
    times = int(count_auxiliary) + int(compat == "reference" and loss_type == "kd_lm")
    total = distillation + times * auxiliary
    return total + language_modelling if loss_type == "kd_lm" else total


def forward_kl(log_p_CV: Tensor, log_q_CV: Tensor, weight: float = 0.5) -> Tensor:
    """KL(p || q) of each row."""
    p_CV = log_p_CV.exp()
    return _dot(p_CV, log_p_CV) - _dot(p_CV, log_q_CV)


def reverse_kl(log_p_CV: Tensor, log_q_CV: Tensor, weight: float = 0.5) -> Tensor:
    """KL(q || p) of each row."""
    return _dot(log_q_CV.exp(), log_q_CV - log_p_CV)


def jsd(log_p_CV: Tensor, log_q_CV: Tensor, weight: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence of each row, ``weight`` on the teacher."""
    log_m_CV = torch.logaddexp(log_p_CV + math.log(weight), log_q_CV + math.log1p(-weight))
    return weight * forward_kl(log_p_CV, log_m_CV) + (1 - weight) * forward_kl(log_q_CV, log_m_CV)


DIVERGENCES: dict[DivergenceName, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def _dot(a_CV: Tensor, b_CV: Tensor) -> Tensor:
    """Row-wise scalar product, without a tensor of the products."""
    return (a_CV.unsqueeze(1) @ b_CV.unsqueeze(2)).flatten()


def apply_temperature(logits_CV: Tensor, temperature: float) -> Tensor:
    return logits_CV if temperature == 1 else logits_CV / temperature


def _leading(head_VD: Tensor, rows: int) -> Tensor:
    """The first rows; the head itself when these are all: the gradient of a slice is a second full tensor."""
    return head_VD if len(head_VD) == rows else head_VD[:rows]


def _shared_rows(student: int, teacher: int, vocabulary: int | None) -> int:
    if vocabulary is None and student != teacher:
        raise ConfigError(
            f"the student's head has {student} rows, the teacher's {teacher}: compare their tokenizers and "
            "say how many leading rows they share"
        )
    shared = student if vocabulary is None else vocabulary
    if not 0 < shared <= min(student, teacher):
        raise ConfigError(f"{shared} shared rows do not fit heads of {student} and {teacher} rows")
    return shared


def _require_rows(teacher: int, student: int) -> None:
    if teacher != student:
        raise DataError(
            f"the teacher has {teacher} positions to distil in this batch, the student {student}: "
            "they do not stand for the same text; a teacher that gives an image another number of tokens "
            "can teach the response alone ('tokens: response')"
        )


def _cached_rows(labels_BL: Tensor, ids_RK: Tensor, log_probabilities_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[R]`` of the cached positions, and the log-probabilities in float32. Raises DataError when rows are missing."""
    rows_R, _ = positions.response(labels_BL)
    if len(ids_RK) != len(rows_R):
        raise DataError(
            f"the cached teacher has {len(ids_RK)} positions for this batch, its labels supervise {len(rows_R)}: "
            "the cache was made with another template, length or mixture; make it again"
        )
    return rows_R, log_probabilities_RK.float()


def _divide(
    total: Tensor, measured: dict[str, Tensor], names: tuple[str, ...], rows: int, denominator: Tensor | float | None
) -> Losses:
    divisor = max(1, rows) if denominator is None else denominator
    zero = torch.zeros_like(total.detach())
    return total / divisor, {name: measured.get(name, zero) / divisor for name in names}
