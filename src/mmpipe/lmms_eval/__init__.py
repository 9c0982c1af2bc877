"""Our checkpoints as a model of lmms-eval 0.7.3 or later (``--model mmpipe``), found by its entry points."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The manifest that lmms-eval's registry reads from the entry point ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mmpipe", simple_class_path="mmpipe.lmms_eval.model.Mmpipe")
