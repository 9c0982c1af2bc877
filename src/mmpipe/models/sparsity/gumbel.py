"""Decisions that can be learnt: sampled forwards, smooth backwards (Jang et al., arXiv 1611.01144)."""

from __future__ import annotations

import torch
from torch import Tensor


def noise(tokens: int, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise ``[tokens, 2]`` for the two classes of each token, float32, on the CPU."""
    return -torch.empty(tokens, 2).exponential_(generator=generator).log()


def straight_through(logits_T2: Tensor, noise_T2: Tensor, temperature: float) -> Tensor:
    """Whether class 0 is drawn, ``[T]`` of zeros and ones, float32.

    The gradient is that of ``softmax((log p + noise) / temperature)``.
    """
    soft_T = ((logits_T2.float().log_softmax(-1) + noise_T2) / temperature).softmax(-1)[..., 0]
    hard_T = (soft_T >= 0.5).to(soft_T.dtype)
    return hard_T - soft_T.detach() + soft_T


def temperature(progress: float, start: float, end: float) -> float:
    """The temperature when the share ``progress`` of the steps is done: from ``start`` to ``end``, geometrically."""
    return start * (end / start) ** progress
