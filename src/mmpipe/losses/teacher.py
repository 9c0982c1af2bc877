"""Shared vocabularies of student and teacher, and cached teacher distributions.

Heads are padded to round sizes (Qwen2-7B has 152064 rows, Qwen2-0.5B 151936, with the same tokenizer), so distributions are
compared over the leading rows that both have. That requires equal tokens under equal ids.

A cached distribution is a few tokens and their log-probabilities for each position that predicts a supervised token, in
order over the batch, as in the cached losses of :mod:`mmpipe.losses.distillation`. Probabilities are those of the softmax
over the first ``vocabulary`` rows of the teacher's head, by default all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mmpipe.errors import ArtifactError, ConfigError
from mmpipe.losses import CHUNK_BYTES, positions
from mmpipe.losses.head import chunks


class HasVocabulary(Protocol):
    """The part of a tokenizer's interface used here."""

    def get_vocab(self) -> dict[str, int]: ...


def shared_rows(student: HasVocabulary, teacher: HasVocabulary, student_rows: int, teacher_rows: int) -> int:
    """The number of leading rows both heads have. Rows beyond a tokenizer's last token are padding and may differ in number.

    Raises ConfigError when an id below that number is another token for the teacher than for the student, or when a token's
    id is beyond it.
    """
    of_student = {i: token for token, i in student.get_vocab().items()}
    of_teacher = {i: token for token, i in teacher.get_vocab().items()}
    rows = min(student_rows, teacher_rows)
    different = sorted(
        i for i in of_student.keys() | of_teacher.keys() if of_student.get(i) != of_teacher.get(i) or i >= rows
    )
    if different:

        def name(tokens: dict[int, str], i: int) -> str:
            return repr(tokens[i]) if i in tokens else "nothing"

        shown = ", ".join(f"{i} ({name(of_student, i)} / {name(of_teacher, i)})" for i in different[:5])
        raise ConfigError(
            f"student and teacher do not share a vocabulary: of the {rows} rows both heads have, "
            f"{len(different)} ids differ, the first (student / teacher): {shown}. "
            "Distillation compares distributions id by id: take a teacher with the student's tokenizer"
        )
    return rows


def token_rows(tokenizer: HasVocabulary) -> int:
    """The number of leading rows of a head that stand for tokens; those beyond are padding."""
    return max(tokenizer.get_vocab().values()) + 1


def most_probable_tokens(
    hidden_BLE: Tensor, head_UE: Tensor, labels_BL: Tensor, k: int, *, vocabulary: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k most probable tokens of each row: ids (int64) and log-probabilities (float32), both ``[R, K]``."""
    if not 0 < k <= (vocabulary or len(head_UE)):
        raise ConfigError(f"{k} tokens a position, of a vocabulary of {vocabulary or len(head_UE)}")
    return _rows(hidden_BLE, head_UE, labels_BL, k, vocabulary, lambda log_p_CV: log_p_CV.topk(k, dim=1).indices)


def sample_tokens(
    hidden_BLE: Tensor,
    head_UE: Tensor,
    labels_BL: Tensor,
    k: int,
    *,
    generator: torch.Generator,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor]:
    """k tokens a row sampled with replacement: ids and log-probabilities as of :func:`most_probable_tokens`."""

    def choose(log_p_CV: Tensor) -> Tensor:
        return torch.multinomial(log_p_CV.exp(), k, replacement=True, generator=generator)

    return _rows(hidden_BLE, head_UE, labels_BL, k, vocabulary, choose)


@torch.no_grad()
def _rows(
    hidden_BLE: Tensor,
    head_UE: Tensor,
    labels_BL: Tensor,
    k: int,
    vocabulary: int | None,
    choose: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    shared = len(head_UE) if vocabulary is None else vocabulary
    if not 0 < shared <= len(head_UE):
        raise ConfigError(f"{shared} shared rows do not fit a head of {len(head_UE)}")
    rows_R, _ = positions.response(labels_BL)
    hidden_RE = hidden_BLE.flatten(0, 1)[rows_R].to(head_UE.dtype)
    ids_RK = torch.empty(len(rows_R), k, dtype=torch.int64, device=hidden_RE.device)
    log_p_RK = torch.empty(len(rows_R), k, device=hidden_RE.device)
    for rows in chunks(len(rows_R), shared, CHUNK_BYTES):
        log_p_CV = (hidden_RE[rows] @ head_UE[:shared].T).float().log_softmax(1)
        if not torch.isfinite(log_p_CV.sum()):
            raise ArtifactError("the teacher's logits are not finite: its weights are damaged or too large")
        ids_RK[rows] = choose(log_p_CV)
        log_p_RK[rows] = log_p_CV.gather(1, ids_RK[rows])
    return ids_RK, log_p_RK
