"""The positions of a batch that enter a loss.

A causal language model predicts token ``t + 1`` at position ``t``: the row of a supervised token is the one before it.
"""

from __future__ import annotations

from torch import Tensor

IGNORED = -100
"""The label of a token that is not supervised."""


def response(labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that predict a supervised token, and those tokens.

    Returns ``rows_R`` (indices into the batch flattened to B*L, in order) and ``targets_R``.
    """
    targets_BL = labels_BL.new_full(labels_BL.shape, IGNORED)
    targets_BL[:, :-1] = labels_BL[:, 1:]
    targets_T = targets_BL.flatten()
    rows_R = (targets_T != IGNORED).nonzero().squeeze(1)
    return rows_R, targets_T[rows_R]


def every_token(attention_mask_BL: Tensor) -> Tensor:
    """Rows of real tokens that predict a real token, as indices into the batch flattened to B*L."""
    real_BL = attention_mask_BL.bool()
    predicts_BL = real_BL.clone()
    predicts_BL[:, -1] = False
    predicts_BL[:, :-1] &= real_BL[:, 1:]
    return predicts_BL.flatten().nonzero().squeeze(1)


def unshifted(labels_BL: Tensor) -> Tensor:
    """Rows *at* supervised tokens, one too late: LLaVA-MoD's distillation reads these."""
    return (labels_BL.flatten() != IGNORED).nonzero().squeeze(1)
