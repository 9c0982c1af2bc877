"""Predicted cost of a keep rate: operations and bytes, from sizes alone.

Image tokens are dropped from ``sparse_layer`` on. :mod:`mmpipe.analysis.efficiency` measures the real cost.
"""

from __future__ import annotations

from typing import Any


def paper_flops(layers: int, tokens: int, width: int) -> int:
    """Operations of ``layers`` decoder layers over ``tokens`` at once: ``L (32 N C² + 4 N² C)``.

    The count of Dynamic-LLaVA (Huang et al., arXiv 2412.00876), which takes a feed-forward part of three matrices four
    times as wide as the model; LLaMA's own is narrower.
    """
    return layers * (32 * tokens * width**2 + 4 * tokens**2 * width)


def paper_image_flops(layers: int, width: int, tokens: int, retained: int, sparse_layer: int) -> int:
    """Operations over an image's ``tokens``, ``retained`` of them from ``sparse_layer`` on; predictors not counted."""
    return paper_flops(sparse_layer, tokens, width) + paper_flops(layers - sparse_layer, retained, width)


def cache_bytes(
    text_config: Any, rows: int, whole: int, retained: int, sparse_layer: int, bytes_per_number: int
) -> int:
    """Bytes of keys and values of a batch: ``whole`` tokens a row before ``sparse_layer``, ``retained`` from there on.

    Shorter rows count as long as the longest. For layers without a sliding window.
    """
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    tokens = sparse_layer * whole + (text_config.num_hidden_layers - sparse_layer) * retained
    return 2 * rows * heads * size * tokens * bytes_per_number
