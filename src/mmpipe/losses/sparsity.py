"""How far a sparsified model is from its keep rates: squared differences of means (Dynamic-LLaVA, equation 10).

The paper writes a Frobenius norm; the published code, and this, the squared difference. Sums over images or rows are
divided by ``normaliser``, their number in the global batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def image_loss(keep_PN: Tensor, rate: float, normaliser: Tensor) -> Tensor:
    """``sum over images of (rate - share kept)^2 / normaliser``; keep is 0 or 1 for each of N tokens."""
    return ((rate - keep_PN.mean(1)) ** 2).sum() / normaliser


def text_loss(keep_T: Tensor, row_T: Tensor, rate: float, minimum: int, normaliser: Tensor) -> Tensor:
    """The same of the rows with at least ``minimum`` tokens; shorter ones, kept whole, cost nothing but count.

    ``row_T`` tells the row of each token. As published, so that a batch of short answers does not press as hard as one of
    long ones.
    """
    lengths_B = torch.bincount(row_T)
    share_B = keep_T.new_zeros(len(lengths_B)).index_add(0, row_T, keep_T) / lengths_B.clamp_min(1)
    return ((rate - share_B) ** 2)[lengths_B >= minimum].sum() / normaliser
