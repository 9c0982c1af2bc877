"""What every layout can be asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmpipe.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Part:
    """A directory of files and the layout they are in."""

    directory: Path
    layout: Layout

    def __str__(self) -> str:
        return str(self.directory)


@dataclass(frozen=True)
class Whole:
    """A whole vision-language model as it was found."""

    model: LlavaForConditionalGeneration
    """The stock model; its tensors have the precision of the files."""
    tokenizer: PreTrainedTokenizerBase
    pictures: Path
    """The directory whose ``preprocessor_config.json`` says how pictures are prepared."""


class Layout:
    """How one family of checkpoints names its files and tensors.

    A layout of language models defines ``language``; one of whole models defines ``whole``.
    """

    def language(self, directory: Path, dtype: torch.dtype | str) -> PreTrainedModel:
        """The language model in a stock class, its parameters of ``dtype`` (``auto``: as stored).

        Raises ArtifactError naming tensors that are missing, left over or misshapen.
        """
        raise ConfigError(f"{directory}: the layout '{self}' holds no language model")

    def tokenizer(self, directory: Path) -> PreTrainedTokenizerBase:
        """The tokenizer beside a language model."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory)

    def whole(self, directory: Path, parts: Mapping[str, Part]) -> Whole:
        """The whole model. ``parts`` are the backbones named beside it (``vision``, ``language``).

        Raises ArtifactError naming tensors that are missing, left over or misshapen.
        """
        raise ConfigError(
            f"{directory}: the layout '{self}' holds no whole vision-language model; name it under model.language"
        )

    def __str__(self) -> str:
        return type(self).__module__.rpartition(".")[2]
