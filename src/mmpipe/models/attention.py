"""Precision and attention implementation of a model: flash attention where available, PyTorch's own otherwise."""

from __future__ import annotations

import logging
from typing import Any

import torch

from mmpipe.errors import ConfigError

log = logging.getLogger(__name__)

FLASH = "flash_attention_2"


def inference_dtype(device: str) -> torch.dtype:
    """The precision of models that only answer: bfloat16 on a GPU (``cuda``, ``cuda:1``), float32 elsewhere."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def choose(wanted: str, device: str, dtype: torch.dtype) -> str:
    """The implementation to use; ``auto`` takes flash attention when it is installed and supports device and dtype.

    Raises ConfigError when flash attention is asked for by name and cannot be used.
    """
    if wanted not in ("auto", FLASH):
        return wanted
    problem = why_not_flash(device, dtype)
    if problem and wanted == FLASH:
        raise ConfigError(f"hardware.attention: {FLASH} cannot be used: {problem}; say 'auto' or 'sdpa'")
    chosen = "sdpa" if problem else FLASH
    log.info("attention: %s%s", chosen, f" ({FLASH}: {problem})" if problem else "")
    return chosen


def why_not_flash(device: str, dtype: torch.dtype) -> str | None:
    """Why flash attention 2 cannot run here; None when it can."""
    from transformers.utils import is_flash_attn_2_available

    if device != "cuda":
        return "it needs a GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it does not compute in {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "this GPU is older than Ampere"
    if not is_flash_attn_2_available():
        return "the package flash-attn is not installed"
    return None


def use(model: Any, implementation: str) -> None:
    """Set the attention of the language model and, where possible, the tower; custom attention is left as it is."""
    for part in (model.model.language_model, model.model.vision_tower):
        if part.config._attn_implementation not in (FLASH, "sdpa", "eager"):
            continue
        supported = implementation != FLASH or getattr(part, "_supports_flash_attn", False)
        part.set_attn_implementation(implementation if supported else "sdpa")
