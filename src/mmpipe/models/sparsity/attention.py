"""Attention with a learnable key mask, for training.

MaskedSoftmax as in Dynamic-LLaVA (after DynamicViT, Rao et al. 2021): a dropped key counts for the query at its own
place only. With scores a and the policy p, ``e_ij = exp(a_ij - max_j a_ij) * (p_j + (1 - p_j) [i = j])`` and ``A_ij =
(e_ij + eps / N) / (sum_j e_ij + eps)``. The factor lets gradients reach p, which no fused kernel offers. Here eps is
spread over the N keys a query may attend to, so that nothing leaks from later tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from mmpipe.models.forward_context import Args, HookResult, Kwargs

NAME = "mmpipe_masked_softmax"
POLICY = "key_policy"
EPSILON = 1e-6


def masked_softmax(scores_BHQK: Tensor, policy_BK: Tensor, allowed_BQK: Tensor) -> Tensor:
    """Attention weights, float32; ``allowed_BQK`` is true for keys a query may attend to. Queries are the last keys."""
    queries, keys = scores_BHQK.shape[-2:]
    own_QK = torch.eye(keys, device=scores_BHQK.device)[keys - queries :]
    seen_BQK = policy_BK[:, None] + (1 - policy_BK[:, None]) * own_QK
    allowed_B1QK = allowed_BQK[:, None]
    scores_BHQK = scores_BHQK.float().masked_fill(~allowed_B1QK, -torch.inf)
    e_BHQK = (scores_BHQK - scores_BHQK.amax(-1, keepdim=True).detach()).exp() * seen_BQK[:, None]
    share_B1QK = allowed_B1QK * (EPSILON / allowed_B1QK.sum(-1, keepdim=True))
    return (e_BHQK + share_B1QK) / (e_BHQK.sum(-1, keepdim=True) + EPSILON)


def masked_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    key_policy: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; ``attention_mask`` is ``[B, 1, Q, K]``, true where allowed."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = masked_softmax(query @ key.transpose(2, 3) * scaling, key_policy, attention_mask[:, 0])
    weights = nn.functional.dropout(weights.to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, masked_attention)


def choose(attention: Any, args: Args, kwargs: Kwargs) -> HookResult:
    """Pre-hook of a layer's attention: with a policy, :func:`masked_attention` computes it.

    The layer's own configuration is unchanged; a copy replaces it until :func:`restore`. Runs again when gradient
    checkpointing computes a layer twice.
    """
    if POLICY in kwargs:
        attention.plain_config = attention.config
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation = NAME
    return args, kwargs


def restore(attention: Any, args: Args, output: Any) -> None:
    """Hook of a layer's attention, called also after a failure: restores the layer's own configuration."""
    attention.config = attention.__dict__.pop("plain_config", attention.config)
