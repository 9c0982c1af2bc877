"""When routing has collapsed: most tokens of a layer make one and the same choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ALARM = 0.5
"""A layer has collapsed when its most common choice of experts is that of more than this share of the tokens."""


def top_set_share(indices_TK: Tensor, experts: int) -> Tensor:
    """Share of the tokens that make the most common ordered choice of k of ``experts``; a scalar, zero without tokens."""
    code_T = indices_TK[:, 0]
    for choice in range(1, indices_TK.shape[1]):
        code_T = code_T * experts + indices_TK[:, choice]
    if not len(code_T):
        return code_T.new_zeros((), dtype=code_T.dtype).float()
    return code_T.unique(return_counts=True)[1].max() / len(code_T)
