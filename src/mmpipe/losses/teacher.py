"""What a teacher leaves behind for students to come: a few tokens and their log-probabilities a position.

Rows are the positions that predict a supervised token, in order over the batch, as the cached losses of
:mod:`mmpipe.losses.distillation` expect them. Probabilities are those of the softmax over the first ``vocabulary``
rows of the teacher's head, by default all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmpipe.errors import ArtifactError, ConfigError
from mmpipe.losses import positions
from mmpipe.losses.head import CHUNK_BYTES, chunks


def most_likely(
    hidden_BLE: Tensor, head_UE: Tensor, labels_BL: Tensor, k: int, *, vocabulary: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k most likely tokens of each row: ids (int64) and log-probabilities (float32), both ``[R, K]``."""
    if not 0 < k <= (vocabulary or len(head_UE)):
        raise ConfigError(f"{k} tokens a position, of a vocabulary of {vocabulary or len(head_UE)}")
    return _rows(hidden_BLE, head_UE, labels_BL, k, vocabulary, lambda log_p_CV: log_p_CV.topk(k, dim=1).indices)


def draws(
    hidden_BLE: Tensor,
    head_UE: Tensor,
    labels_BL: Tensor,
    k: int,
    *,
    generator: torch.Generator,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor]:
    """k tokens a row drawn with replacement: ids and log-probabilities as of :func:`most_likely`."""
    return _rows(
        hidden_BLE,
        head_UE,
        labels_BL,
        k,
        vocabulary,
        lambda log_p_CV: torch.multinomial(log_p_CV.exp(), k, replacement=True, generator=generator),
    )


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
