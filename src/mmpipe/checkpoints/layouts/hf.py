"""What transformers writes: nothing to convert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpipe.checkpoints.layouts.base import Layout, Part, Whole
from mmpipe.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Stock(Layout):
    """A language model that ``AutoModelForCausalLM`` opens, or a LLaVA of transformers (``llava-hf/...``, or ours)."""

    def language(self, directory: Path, dtype: torch.dtype | str) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        return model

    def whole(self, directory: Path, parts: Mapping[str, Part]) -> Whole:
        from mmpipe.checkpoints.save import load_checkpoint

        for role, part in parts.items():
            raise ConfigError(f"{directory} is complete; leave model.{role} ({part}) out")
        model, processor = load_checkpoint(directory, "auto")
        return Whole(model, processor.tokenizer, directory)


LAYOUT = Stock()
