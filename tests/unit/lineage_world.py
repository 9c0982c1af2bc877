"""Checkpoints in the layouts of others, made from the tiny model of the tests' world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmpipe.models import vlm
from mmpipe.models.export import save_checkpoint
from mmpipe.stages.base import VisionLanguage

BACKBONES = {
    "vision": Path("resources/backbones/clip-tiny"),
    "language": Path("resources/backbones/qwen2-tiny"),
}


def tiny_model(seed: int = 0) -> tuple[Any, Any]:
    """The world's model with a projector drawn from ``seed``; call it below the world's directory."""
    return vlm.build(
        BACKBONES,
        VisionLanguage(vision="clip-tiny", language="qwen2-tiny"),
        template="chatml",
        image_aspect="pad",
        seed=seed,
    )


def stock_checkpoint(out: Path, dtype: Any) -> Any:
    """Write a checkpoint of transformers without a manifest, as from the hub; returns its model."""
    model, processor = tiny_model(seed=3)
    save_checkpoint(model.to(dtype), processor, out)
    return model
