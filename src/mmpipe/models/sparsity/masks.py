"""Attention masks for sequences with dropped tokens, by original positions, for each attention function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmpipe.errors import ConfigError


def allowed(visible_BK: Tensor, key_positions_BK: Tensor, query_positions_BQ: Tensor, window: int | None) -> Tensor:
    """The keys every query attends to, ``[B, Q, K]``: visible ones at no later position, within the window if there is
    one.

    Queries are the last keys; each attends to itself, padding too, so that no row is empty.
    """
    behind_BQK = query_positions_BQ[:, :, None] - key_positions_BK[:, None, :]
    seen_BQK = visible_BK[:, None, :] & (behind_BQK >= 0)
    if window is not None:
        seen_BQK &= behind_BQK < window
    queries, keys = behind_BQK.shape[1:]
    return seen_BQK | torch.eye(keys, dtype=torch.bool, device=seen_BQK.device)[keys - queries :]


def formatted(
    implementation: str,
    visible_BK: Tensor,
    key_positions_BK: Tensor,
    query_positions_BQ: Tensor,
    window: int | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """The mask for transformers' attention function ``implementation``; None where causality alone decides.

    Raises ConfigError for an unknown implementation, or one that counts a window in tokens rather than
    positions.
    """
    if "flash" in implementation:
        if window is not None and int(query_positions_BQ.max()) >= window:
            raise ConfigError(
                f"a text longer than the attention window of {window} tokens cannot be sparsified with "
                f"'{implementation}', which would count the window in kept tokens; load the model "
                "with attn_implementation='sdpa'"
            )
        return None if bool(visible_BK.all()) else visible_BK.long()
    queries, keys = query_positions_BQ.shape[1], visible_BK.shape[1]
    simple = window is None and (queries == 1 or queries == keys)
    if implementation == "sdpa" and simple and bool(visible_BK.all()):
        return None
    seen_B1QK = allowed(visible_BK, key_positions_BK, query_positions_BQ, window)[:, None]
    if implementation == "sdpa":
        return seen_B1QK
    if implementation == "eager":
        return torch.zeros_like(seen_B1QK, dtype=dtype).masked_fill(~seen_B1QK, torch.finfo(dtype).min)
    raise ConfigError(
        f"sparsification knows the attention functions eager, sdpa and flash_attention_*, not '{implementation}'; "
        "load the model with attn_implementation='sdpa'"
    )


def window_of(config: Any, layer: int) -> int | None:
    """The attention window of a decoder layer, None without one."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)
