"""Opening a published checkpoint for inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmpipe.checkpoints.load import open_checkpoint
from mmpipe.data.templates import get_template
from mmpipe.inference.generate import Answerer
from mmpipe.models.attention import inference_dtype


def open_for_inference(
    checkpoint: Path, device: str, dtype: torch.dtype | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    """``(model, processor, manifest)`` of a published checkpoint, the model frozen on ``device``.

    Without a ``dtype``, in that of :func:`inference_dtype`. Raises ArtifactError when files are missing or do not fit.
    """
    model, processor, card = open_checkpoint(checkpoint, dtype or inference_dtype(device))
    return model.to(device).requires_grad_(False).eval(), processor, card


def open_answerer(checkpoint: Path, device: str, *, dtype: torch.dtype | None = None, model_id: str = "") -> Answerer:
    """A published checkpoint ready to answer with its own template; ``model_id`` is recorded with every answer."""
    model, processor, card = open_for_inference(checkpoint, device, dtype)
    template = get_template(card["checkpoint"]["template"], processor.tokenizer)
    return Answerer(model, processor, template, model_id=model_id)
