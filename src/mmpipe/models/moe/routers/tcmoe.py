"""TC-MoE: an expert may be added, subtracted or left out (Yan et al. 2025, ternary choice)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mmpipe.losses import routing
from mmpipe.models.moe.routers.base import LinearRouter, Routing, linear_float

_NEGATIVE_BIAS, _NULL_BIAS = -1.0, -10.0
_NULL_REWARD = 1e-5


class TCMoERouter(LinearRouter):
    """2N + K scores: N to add an expert, N to subtract it, K to do nothing; the k best of their softmax.

    Weights are ``p / (chosen p that do something + all p that do nothing)``, with the sign. The balance loss is over
    the N experts, each with both of its scores. ``null`` rewards doing nothing (1e-5 of its mean probability).

    An expert chosen twice (added and subtracted) counts twice. In the ``reference`` form, as in LibMoE's code, a later
    choice of the same entry modulo N, also one that does nothing, replaces an earlier one (there the replaced one still
    gets a gradient, here it does not); and the balance loss, ``sum_e (choices of e / (K * tokens of a sequence)) *
    mean(p_e)``, grows with the batch; the z-loss is of the scores without their biases.
    """

    NORMALISED: ClassVar[bool] = False
    STARTS_ALIKE: ClassVar[bool] = True

    def rows(self) -> int:
        return 2 * self.experts + self.top_k

    def forward(self, hidden_TD: Tensor, sequence_T: Tensor | None = None) -> Routing:
        n = self.experts
        raw_TM = linear_float(hidden_TD, self.weight)
        bias_M = raw_TM.new_zeros(raw_TM.shape[1])
        bias_M[n : 2 * n], bias_M[2 * n :] = _NEGATIVE_BIAS, _NULL_BIAS
        logits_TM = raw_TM + bias_M
        p_TM = logits_TM.softmax(1)
        best_TK, choice_TK = p_TM.topk(self.top_k, dim=1)
        acts_TK = choice_TK < 2 * n
        nothing_T1 = p_TM[:, 2 * n :].sum(1, keepdim=True)
        total_T1 = (best_TK * acts_TK).sum(1, keepdim=True) + nothing_T1
        sign_TK = torch.where(choice_TK < n, 1.0, -1.0) * acts_TK
        weights_TK = sign_TK * best_TK / total_T1.clamp_min(1e-6)
        indices_TK = torch.where(acts_TK, choice_TK % n, 0)
        if self.reference:
            weights_TK = weights_TK * _last_of_each(choice_TK % n)

        pair_TN = p_TM[:, :n] + p_TM[:, n : 2 * n]
        share_TN = pair_TN / pair_TN.sum(1, keepdim=True)
        return Routing(
            indices_TK,
            weights_TK,
            losses={
                "balance": self._balance(share_TN, indices_TK, choice_TK % n, sequence_T),
                "z": routing.z_loss(raw_TM if self.reference else logits_TM),
                "entropy": routing.entropy(p_TM),
                "null": -_NULL_REWARD * routing.mean_over_tokens(nothing_T1.squeeze(1)),
            },
            statistics={
                "entropy": routing.entropy(p_TM.detach()),
                "margin": routing.margin(weights_TK.detach().abs()),
                "null": (~acts_TK).float().mean(),
            },
        )

    def _balance(self, share_TN: Tensor, indices_TK: Tensor, entry_TK: Tensor, sequence_T: Tensor | None) -> Tensor:
        if not self.reference:
            return routing.load_balancing_loss(share_TN, indices_TK[:, 0], sequence_T)
        sequences = 1 if sequence_T is None or not len(sequence_T) else int(sequence_T.max()) + 1
        choices = max(1, entry_TK.numel()) / sequences
        load_N = torch.bincount(entry_TK.flatten(), minlength=self.experts) / choices
        return (load_N * routing.mean_over_tokens(share_TN)).sum()


def _last_of_each(entry_TK: Tensor) -> Tensor:
    """Whether no later choice of the token is of the same entry."""
    same_TKK = entry_TK[:, :, None] == entry_TK[:, None, :]
    return ~same_TKK.triu(1).any(2)
