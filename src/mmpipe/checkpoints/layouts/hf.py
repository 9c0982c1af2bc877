"""The layout of transformers, without conversion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mmpipe.checkpoints.complete import load_complete
from mmpipe.checkpoints.layouts.base import BackboneFiles, ImportedModel, Layout
from mmpipe.checkpoints.save import load_checkpoint
from mmpipe.errors import ConfigError


class HuggingFace(Layout):
    """A language model that ``AutoModelForCausalLM`` opens, or a LLaVA of transformers (``llava-hf/...``, or ours)."""

    def language(self, directory: Path, dtype: torch.dtype | str) -> PreTrainedModel:
        model: PreTrainedModel = load_complete(AutoModelForCausalLM, directory, dtype=dtype)
        return model

    def whole(self, directory: Path, parts: Mapping[str, BackboneFiles]) -> ImportedModel:
        for role, part in parts.items():
            raise ConfigError(f"{directory} is complete; leave model.{role} ({part}) out")
        model, processor = load_checkpoint(directory, "auto")
        return ImportedModel(model, processor.tokenizer, directory)


LAYOUT = HuggingFace()
