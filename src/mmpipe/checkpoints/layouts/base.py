"""The interface of a layout."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mmpipe.checkpoints.layouts import _tensors
from mmpipe.errors import ArtifactError, ConfigError, did_you_mean
from mmpipe.pretrained import load_pretrained


@dataclass(frozen=True)
class BackboneFiles:
    """A directory of files and the layout they are in."""

    directory: Path
    layout: Layout

    def __str__(self) -> str:
        return str(self.directory)


@dataclass(frozen=True)
class ImportedModel:
    """An imported vision-language model."""

    model: LlavaForConditionalGeneration
    """The stock model; its tensors have the precision of the files."""
    tokenizer: PreTrainedTokenizerBase
    images: Path
    """The directory with the ``preprocessor_config.json`` of its image preprocessing."""
    image_aspect: str | None = None
    """The image aspect of its training (``pad``, ``square``), where the files state it."""


class Layout:
    """The files and tensor names of one family of checkpoints.

    A layout of language models defines ``language``; one of whole models defines ``whole``.
    """

    def language(self, directory: Path, dtype: torch.dtype | str) -> PreTrainedModel:
        """The language model in a stock class, its parameters of ``dtype`` (``auto``: as stored).

        Raises ArtifactError naming tensors that are missing, left over or misshapen.
        """
        raise ConfigError(f"{directory}: the layout '{self}' holds no language model")

    def tokenizer(self, directory: Path) -> PreTrainedTokenizerBase:
        """The tokenizer beside a language model.

        Raises ArtifactError when it cannot be read.
        """
        try:
            return load_pretrained(AutoTokenizer, directory)
        except (ImportError, OSError, ValueError) as error:
            raise unreadable_tokenizer(directory, error) from error

    def whole(self, directory: Path, parts: Mapping[str, BackboneFiles]) -> ImportedModel:
        """The whole model. ``parts`` are the backbones named beside it (``vision``, ``language``).

        Raises ArtifactError naming tensors that are missing, left over or misshapen.
        """
        raise ConfigError(
            f"{directory}: the layout '{self}' holds no whole vision-language model; name it under model.language"
        )

    def write(self, checkpoint: Path, out: Path, *, language: str | None, tower: str, binary: bool) -> None:
        """Write a published checkpoint into the empty directory ``out`` in this layout, bit-identically.

        ``language`` is the layout of the language model inside, where that is packed; ``tower`` is what the
        configuration calls the vision tower; ``binary`` writes ``pytorch_model.bin`` instead of safetensors.
        """
        raise ConfigError(f"nothing is written in the layout '{self}'")

    def __str__(self) -> str:
        return type(self).__module__.rpartition(".")[2]


def unreadable_tokenizer(directory: Path, error: Exception) -> ArtifactError:
    """The ArtifactError for a tokenizer that failed with ``error``; transformers' own message can mislead."""
    modules = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    lacking = [package for package, module in modules.items() if not _is_installed(module)]
    if lacking and (directory / "tokenizer.model").is_file():
        return ArtifactError(
            f"{directory}: reading its tokenizer.model takes {' and '.join(lacking)}: pip install {' '.join(lacking)}"
        )
    reason = str(error).strip().partition("\n")[0]
    return ArtifactError(f"{directory}: its tokenizer cannot be read ({reason})")


def _is_installed(module: str) -> bool:
    package = module.partition(".")[0]
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(module) is not None


class PackedLanguage(Layout):
    """A language model equivalent to a stock class, with other tensor names and packed matrices."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ()
    """The ``model_type`` of its configurations, alone and inside LLaVA checkpoints."""

    def config(self, written: Mapping[str, Any]) -> Any:
        """The stock configuration of the same function, from the content of its ``config.json``."""
        raise NotImplementedError

    def written(self, config: Any) -> dict[str, Any]:
        """The inverse: its own ``config.json`` of a stock configuration, without the model type."""
        raise NotImplementedError

    def to_stock(self, tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Tensors by the names of the stock class, exactly; unknown names stay as they are, to be reported."""
        raise NotImplementedError

    def from_stock(self, tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """The exact inverse."""
        raise NotImplementedError

    def language(self, directory: Path, dtype: torch.dtype | str) -> PreTrainedModel:
        written = _tensors.read_config(directory / "config.json")
        kind = str(written.get("model_type"))
        if kind not in self.MODEL_TYPES:
            raise ArtifactError(
                f"{directory}: holds a '{kind}' model, the layout '{self}' one of {', '.join(self.MODEL_TYPES)}"
                + did_you_mean(kind, self.MODEL_TYPES)
            )
        config = self.config(written)
        shell: Any = AutoModelForCausalLM._model_mapping[type(config)]
        tensors = self.to_stock(_tensors.read_weights(directory), config)
        model: PreTrainedModel = _tensors.assemble(shell, config, tensors, directory, dtype)
        return model
