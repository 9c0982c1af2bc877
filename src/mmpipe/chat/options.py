"""How a checkpoint is to be loaded. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Bits = Literal[4, 8]
DTYPES: tuple[str, ...] = get_args(Literal["auto", "float32", "bfloat16", "float16"])


@dataclass(frozen=True)
class Loading:
    """How to load a checkpoint."""

    template: str | None = None
    """Must be the checkpoint's own; only one that brings none is given it."""
    dtype: str = "auto"
    """``auto``: as the weights are stored."""
    device: str = "auto"
    """``auto``: the first GPU, else the CPU."""
    device_map: str | None = None
    """``auto`` spreads the layers over all GPUs, then main memory."""
    bits: Bits | None = None
    """Of the language model's weights."""
    sparsity: str | None = None
    """Of a sparsified model: the share of an image to keep, or ``off`` for the dense model behind it."""
