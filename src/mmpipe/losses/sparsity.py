"""Distances of a sparsified model from its keep rates: squared differences of means (Dynamic-LLaVA, equation 10).

The paper has a Frobenius norm; the published code, and this one, the squared difference. Sums over images or rows are
divided by ``denominator``, their number in the global batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def image_loss(keep_PN: Tensor, rate: float, denominator: Tensor) -> Tensor:
    """``sum over images of (rate - share retained)^2 / denominator``; keep is 0 or 1 for each of N tokens."""
    return ((rate - keep_PN.mean(1)) ** 2).sum() / denominator


def text_loss(keep_T: Tensor, row_T: Tensor, rate: float, minimum: int, denominator: Tensor) -> Tensor:
    """The same over the rows with at least ``minimum`` tokens; shorter ones are retained whole: zero, but counted.

    ``row_T`` is the row of each token. As published: a batch of short answers weighs less than one of long ones.
    """
    lengths_B = torch.bincount(row_T)
    share_B = keep_T.new_zeros(len(lengths_B)).index_add(0, row_T, keep_T) / lengths_B.clamp_min(1)
    return ((rate - share_B) ** 2)[lengths_B >= minimum].sum() / denominator
