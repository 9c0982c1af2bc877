"""Dropping what an expert has no room for, in training.

DeepSpeed's rule, which LLaVA-MoD trains with: an expert has ``C`` slots. First choices take slots in the
order of the tokens, then second choices queue behind *all* first choices, dropped ones included, and so on. A
choice beyond the last slot is dropped; the weights of what is left of a token are scaled up again. A token
that loses all its choices passes through the residual stream only. Order means position: late tokens, which
are the answers, are dropped first.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def capacity(tokens: int, experts: int, top_k: int, factor: float, minimum: int = 0) -> int:
    """Slots of an expert: ``ceil(tokens / experts * factor * top_k)``, at least ``minimum``."""
    return max(math.ceil(tokens / experts * factor * top_k), minimum)


def drop(indices_TK: Tensor, weights_TK: Tensor, experts: int, slots: int, *, rescale: bool) -> tuple[Tensor, Tensor]:
    """Set the weights of dropped choices to zero; returns ``(weights_TK, kept_TK)``.

    A dropped choice keeps its index: it is computed and counts nothing. ``rescale`` makes what is left of
    each token add up to one again.
    """
    kept_TK = slot_numbers(indices_TK, experts) < slots
    weights_TK = weights_TK * kept_TK
    if rescale:
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp_min(torch.finfo(weights_TK.dtype).eps)
    return weights_TK, kept_TK


def slot_numbers(indices_TK: Tensor, experts: int) -> Tensor:
    """The place of each choice in its expert's queue, ``[T, K]``, from zero."""
    queue_KT = indices_TK.T.flatten()
    taken_QN = F.one_hot(queue_KT, experts).cumsum(0) - 1
    return taken_QN.gather(1, queue_KT[:, None]).view(indices_TK.T.shape).T
