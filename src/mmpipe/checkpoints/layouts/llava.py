"""Checkpoints of the original LLaVA and its derivatives: whole models, adapters, and projectors alone.

The content of a directory follows from its files, never from its name (haotian-liu/LLaVA, ``llava/model/builder.py``):

* ``pytorch_model*.bin`` or ``model*.safetensors``: a whole model, with or without the vision tower's tensors;
* ``adapter_config.json``, ``adapter_model.*``, ``non_lora_trainables.bin``: a LoRA adapter and the trained projector;
* ``mm_projector.bin`` alone: a projector.

The last two need a base, which the recipe names as ``model.language``; the tower is always named as
``model.vision``, as LLaVA's configuration only refers to it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from mmpipe.checkpoints.layouts import _names, _tensors, _write_llava, packed_language
from mmpipe.checkpoints.layouts.base import BackboneFiles, ImportedModel, Layout, PackedLanguage
from mmpipe.errors import ArtifactError, ConfigError, first_of
from mmpipe.models import lora
from mmpipe.models.llava import IMAGE_TOKEN, joined_config, vision_tower, with_image_token

log = logging.getLogger(__name__)

CONFIG, PROJECTOR_FILE = "config.json", "mm_projector.bin"
ADAPTER_CONFIG, ADAPTER_STEM, REST = "adapter_config.json", "adapter_model", "non_lora_trainables.bin"
_FAMILIES = {"llava": "llama", "llava_qwen": "qwen2", "llava_qwen1_5": "qwen2"}
"""Stock model types of LLaVA's exceptions to ``llava_{type}``."""


class Llava(Layout):
    """haotian-liu/LLaVA 1.x, MoE-LLaVA and LLaVA-MoD without experts, LLaVA-MOSS2."""

    def whole(self, directory: Path, parts: Mapping[str, BackboneFiles]) -> ImportedModel:
        written = _tensors.read_config(directory / CONFIG)
        text, packed = text_config(directory, written)
        tower = named_tower(directory, written, parts)
        tensors = {f"{_names.TOWER}{name}": tensor for name, tensor in tower.state_dict().items()}
        own = self.tensors(directory, parts, text, packed)
        if any(name.startswith(_names.TOWER) for name in own):
            tensors = {}  # a tower in the checkpoint is the one that was trained
        tensors |= own
        tokenizer = with_image_token(checkpoint_tokenizer(directory, parts, packed), directory)
        config = joined_config(
            tower.config,
            text,
            image_id=int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)),  # type: ignore[arg-type]
            feature_layer=int(written.get("mm_vision_select_layer", -2)),
            feature_select=_feature_select(directory, written),
        )
        model = _tensors.assemble(LlavaForConditionalGeneration, config, tensors, directory, "auto")
        return ImportedModel(model, tokenizer, parts["vision"].directory, written.get("image_aspect_ratio"))

    def write(self, checkpoint: Path, out: Path, *, language: str | None, tower: str, binary: bool) -> None:
        _write_llava.write(checkpoint, out, language=language, tower=tower, binary=binary)

    def tensors(
        self, directory: Path, parts: Mapping[str, BackboneFiles], text: Any, packed: PackedLanguage | None
    ) -> dict[str, Tensor]:
        """Language model and projector under the stock names, and the tower where the directory holds it."""
        if _tensors.weight_files(directory):
            return _stock_names(_tensors.read_weights(directory), text, packed)
        adapted = (directory / ADAPTER_CONFIG).is_file()
        rest = directory / (REST if adapted else PROJECTOR_FILE)
        if not rest.is_file():
            raise ArtifactError(
                f"{directory}: no LLaVA checkpoint; expected {' or '.join(_tensors.STEMS)} (whole or in shards), "
                f"{ADAPTER_CONFIG} with {REST}, or {PROJECTOR_FILE}"
            )
        if "language" not in parts:
            named = _tensors.read_config(directory / ADAPTER_CONFIG).get("base_model_name_or_path") if adapted else None
            raise ConfigError(
                f"{directory} holds {'an adapter' if adapted else 'a projector'}, not a whole model; name its base "
                "under model.language" + (f" (it was trained on {named})" if named else "")
            )
        tensors = self._base(parts["language"], text)
        if adapted:
            tensors = _merged(directory, tensors, text)
        named = {name.removeprefix("base_model.model."): value for name, value in _tensors.read_file(rest).items()}
        return tensors | _stock_names(named, text, packed)

    def _base(self, base: BackboneFiles, text: Any) -> dict[str, Tensor]:
        """The base of an adapter or a projector: a language model, or a whole LLaVA in this layout."""
        if isinstance(base.layout, Llava):
            written = _tensors.read_config(base.directory / CONFIG)
            return base.layout.tensors(base.directory, {}, *text_config(base.directory, written))
        language = base.layout.language(base.directory, "auto")
        if language.config.model_type != text.model_type:
            raise ArtifactError(
                f"{base}: holds a {language.config.model_type} model, the checkpoint stands on a {text.model_type}"
            )
        return {_names.to_stock(name): tensor for name, tensor in language.state_dict().items()}


def text_config(directory: Path, written: Mapping[str, Any]) -> tuple[Any, PackedLanguage | None]:
    """The stock configuration of a LLaVA's language model, and its layout where that is packed.

    Raises ArtifactError for a family that transformers does not know.
    """
    kind = str(written.get("model_type"))
    if "text_config" in written:
        raise ArtifactError(f"{directory}: a checkpoint of transformers; leave 'layout' out")
    packed = packed_language(kind)
    if packed is not None:
        return packed.config(written), packed
    family = _FAMILIES.get(kind, kind.removeprefix("llava_"))
    if family not in CONFIG_MAPPING_NAMES or not kind.startswith("llava"):
        raise ArtifactError(
            f"{directory}/{CONFIG}: the model type '{kind}' is no LLaVA on a language model of transformers"
        )
    config_class: Any = CONFIG_MAPPING[family]
    known = set(config_class().to_dict()) | {"rope_theta", "rope_scaling"}
    leave = {"model_type", "architectures", "transformers_version", "_name_or_path"}
    facts = {key: value for key, value in written.items() if key in known - leave}
    if facts.get("rope_scaling", ...) is None:
        del facts["rope_scaling"]
    return config_class(**facts, architectures=None), None


def _stock_names(tensors: Mapping[str, Tensor], text: Any, packed: PackedLanguage | None) -> dict[str, Tensor]:
    kept = {name: tensor for name, tensor in tensors.items() if not _names.is_buffer(name)}
    if packed is not None:
        language, others = _names.split_language(kept)
        kept = packed.to_stock(language, text) | others
    return {_names.to_stock(name): tensor for name, tensor in kept.items()}


def _merged(directory: Path, tensors: Mapping[str, Tensor], text: Any) -> dict[str, Tensor]:
    """The base with the adapter of ``directory`` added to its language model.

    Raises ArtifactError when adapter and base do not belong together.
    """
    body = {
        name.replace(_names.LANGUAGE, "model."): tensor
        for name, tensor in tensors.items()
        if name.startswith((_names.LANGUAGE, "lm_head."))
    }
    shell: Any = AutoModelForCausalLM._model_mapping[type(text)]
    language = _tensors.assemble(shell, text, body, directory, "auto")
    files = [path for suffix in ("safetensors", "bin") if (path := directory / f"{ADAPTER_STEM}.{suffix}").is_file()]
    if not files:
        raise ArtifactError(f"{directory}: {ADAPTER_STEM}.safetensors (or .bin) is missing")
    merged = lora.merge_file(language, directory, _tensors.read_file(files[0]))
    return dict(tensors) | {_names.to_stock(name): tensor for name, tensor in merged.state_dict().items()}


def named_tower(directory: Path, written: Mapping[str, Any], parts: Mapping[str, BackboneFiles]) -> Any:
    """The vision tower that a recipe names beside a checkpoint; ConfigError when it names none."""
    if "vision" not in parts:
        named = written.get("mm_vision_tower") or written.get("mm_image_tower")
        raise ConfigError(f"{directory}: its tower '{named}' lies elsewhere; name an entry for it under model.vision")
    return vision_tower(parts["vision"].directory, "auto")


def checkpoint_tokenizer(directory: Path, parts: Mapping[str, BackboneFiles], packed: PackedLanguage | None) -> Any:
    """The tokenizer beside the checkpoint, else that of its base."""
    here = any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    if here or "language" not in parts:
        return (packed or Layout()).tokenizer(directory)
    return parts["language"].layout.tokenizer(parts["language"].directory)


def _feature_select(directory: Path, written: Mapping[str, Any]) -> Any:
    """Our value of LLaVA's ``mm_vision_select_feature``. Wrapped images are refused: no template has their marks."""
    if written.get("mm_use_im_start_end"):
        raise ConfigError(f"{directory}/{CONFIG}: mm_use_im_start_end is true; no template writes these marks")
    words = {"patch": "patch", "cls_patch": "full"}
    feature = str(written.get("mm_vision_select_feature", "patch"))
    if feature not in words:
        raise ArtifactError(f"{directory}/{CONFIG}: mm_vision_select_feature is '{feature}'; known: {first_of(words)}")
    return words[feature]


LAYOUT = Llava()
