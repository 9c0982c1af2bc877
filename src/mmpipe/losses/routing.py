"""Losses and statistics of routers: balance of the experts and certainty of the choices.

``p_TN`` are probabilities over N experts for each of T tokens, ``first_T`` is each token's first choice, both without
padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def load_balancing_loss(p_TN: Tensor, first_T: Tensor, sequence_T: Tensor | None = None) -> Tensor:
    """N * sum_e mean_t(p_te) * mean_t(first_t = e): 1 for uniform use, N when all tokens take one expert.

    Counts the first choice only, before any is dropped (Switch Transformer, eq. 4-6; as in DeepSpeed and LLaVA-MoD, where
    the losses of the layers are summed). The gradient flows through the probabilities.

    With ``sequence_T``, the sequence (or image) of each token, it is the mean of the losses of the sequences (LibMoE).
    """
    experts = p_TN.shape[1]
    if sequence_T is not None:
        return _balance_within_sequences(p_TN, first_T, sequence_T)
    share_N = torch.bincount(first_T, minlength=experts).to(p_TN.dtype) / max(1, len(first_T))
    return experts * (mean_over_tokens(p_TN) * share_N).sum()


def _balance_within_sequences(p_TN: Tensor, first_T: Tensor, sequence_T: Tensor) -> Tensor:
    experts = p_TN.shape[1]
    _, of_T, tokens_S = sequence_T.unique(return_inverse=True, return_counts=True)
    empty_SN = p_TN.new_zeros(len(tokens_S), experts)
    chosen_TN = F.one_hot(first_T, experts).to(p_TN.dtype)
    p_SN = empty_SN.index_add(0, of_T, p_TN) / tokens_S[:, None]
    share_SN = empty_SN.index_add(0, of_T, chosen_TN) / tokens_S[:, None]
    return experts * mean_over_tokens((p_SN * share_SN).sum(1))


def load_balancing_term(p_TN: Tensor, first_T: Tensor, entry: int, sequence_T: Tensor | None = None) -> Tensor:
    """The term of one expert in :func:`load_balancing_loss`."""
    alone_N = F.one_hot(torch.tensor(entry, device=p_TN.device), p_TN.shape[1]).to(p_TN.dtype)
    return load_balancing_loss(p_TN * alone_N, first_T, sequence_T)


def z_loss(logits_TN: Tensor) -> Tensor:
    """Mean squared log-sum-exp of the logits; keeps router logits small (ST-MoE, eq. 5)."""
    return mean_over_tokens(logits_TN.logsumexp(1).square())


def entropy(p_TN: Tensor) -> Tensor:
    """Mean entropy (nats) of the routing distribution: ln N when undecided, 0 when certain."""
    return mean_over_tokens(torch.special.entr(p_TN).sum(1))


def margin(weights_TK: Tensor) -> Tensor:
    """Mean difference of a token's two largest mixture weights; 1 with one expert a token."""
    if weights_TK.shape[1] == 1:
        return weights_TK.new_ones(())
    largest_T2 = weights_TK.topk(2, dim=1).values
    return mean_over_tokens(largest_T2[:, 0] - largest_T2[:, 1])


def mean_over_tokens(values_T: Tensor) -> Tensor:
    """Mean over the first dimension; zero, still differentiable, when there is no token."""
    return values_T.sum(0) / max(1, len(values_T))


def most_common_set_share(indices_TK: Tensor, experts: int) -> Tensor:
    """Share of the tokens with the most common ordered choice of k of ``experts``; a scalar, zero without tokens."""
    code_T = indices_TK[:, 0]
    for choice in range(1, indices_TK.shape[1]):
        code_T = code_T * experts + indices_TK[:, choice]
    if not len(code_T):
        return code_T.new_zeros((), dtype=code_T.dtype).float()
    return code_T.unique(return_counts=True)[1].max() / len(code_T)
