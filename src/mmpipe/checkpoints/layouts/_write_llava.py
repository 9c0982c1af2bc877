"""Writing a published checkpoint in LLaVA's own layout, for scripts and servers based on LLaVA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import apply_umask, read_json, write_json
from mmpipe.checkpoints.layouts import _names, _tensors, get
from mmpipe.checkpoints.layouts.base import PackedLanguage
from mmpipe.errors import ArtifactError, ConfigError
from mmpipe.models import projector
from mmpipe.models.llava import IMAGE_TOKEN

_ROWS = ("model.embed_tokens.weight", "lm_head.weight")
_COMMON = {
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_mm_proj": True,
}
"""Entries of LLaVA's configuration common to all models with LLaVA-1.5's structure."""


def write(checkpoint: Path, out: Path, *, language: str | None, tower: str, binary: bool) -> None:
    """Write ``config.json``, weights and tokenizer, or ``mm_projector.bin`` alone for a projector.

    Tensors are those of the files, under other names; rows of the vocabulary that were added for our own tokens are
    left out. Raises ConfigError for a model that LLaVA's code has no names for.
    """
    card = manifest.read(checkpoint)
    if card["kind"] == "projector":
        _save(_renamed(load_file(checkpoint / projector.FILE)), out / "mm_projector.bin", binary=True)
        return
    config = _tensors.read_config(checkpoint / "config.json")
    text = _stock_text(checkpoint, config)
    rows = getattr(text, "original_vocab_size", text.vocab_size)
    tensors = {
        name: tensor[:rows].contiguous() if name in _ROWS else tensor
        for name, tensor in _renamed(_tensors.read_weights(checkpoint)).items()
    }
    text.vocab_size = rows
    layout = _packed(language) if language else None
    written = layout.written(text) if layout else _plain(text)
    if layout:
        spoken, others = _names.split_language(tensors)
        tensors = layout.from_stock(spoken, text) | others
    drops_class_token = config.get("vision_feature_select_strategy", "default") == "default"
    written |= {
        "model_type": f"llava_{layout or text.model_type}",
        "torch_dtype": str(_tensors.common_dtype(tensors.values())).removeprefix("torch."),
        **_COMMON,
        "image_aspect_ratio": card["checkpoint"]["image_aspect"],
        "mm_hidden_size": config["vision_config"]["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch" if drops_class_token else "cls_patch",
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_tower": tower,
    }
    write_json(out / "config.json", written)
    _write_tokenizer(checkpoint, out, keeps_image_token=config["image_token_index"] < rows)
    _save(tensors, out / ("pytorch_model.bin" if binary else "model.safetensors"), binary=binary)


def _stock_text(checkpoint: Path, config: Mapping[str, Any]) -> Any:
    """The language model's configuration. ConfigError for experts, which LLaVA's code does not support."""
    text = dict(config["text_config"])
    experts = {"num_experts", "num_local_experts", "moe"} & text.keys()
    if config["model_type"] != "llava" or experts:
        raise ConfigError(
            f"{checkpoint}: a sparse model cannot be written in LLaVA's layout, which has no names for experts"
        )
    return CONFIG_MAPPING[text.pop("model_type")](**text)


def _packed(name: str) -> PackedLanguage:
    layout = get(name)
    if not isinstance(layout, PackedLanguage):
        raise ConfigError(f"the layout '{name}' is none of packed language models")
    return layout


def _plain(text: Any) -> dict[str, Any]:
    """A stock language model's configuration as transformers 4 wrote it, which LLaVA's code requires."""
    config: dict[str, Any] = text.to_dict()
    rope = dict(config.pop("rope_parameters", None) or {})
    config["rope_theta"] = rope.pop("rope_theta", 10000.0)
    config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    family = text.model_type.capitalize()
    config["architectures"] = [f"Llava{family}ForCausalLM"]
    for ours in ("dtype", "original_vocab_size", "transformers_version", "_name_or_path"):
        config.pop(ours, None)
    return config


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_names.to_llava(name): tensor for name, tensor in tensors.items()}


def _write_tokenizer(checkpoint: Path, out: Path, *, keeps_image_token: bool) -> None:
    """Copy the tokenizer. LLaVA cuts prompts at ``<image>`` itself; a token without a row in its vocabulary would make
    it resize the embeddings."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        source = checkpoint / name
        if not source.is_file():
            continue
        content = read_json(source)
        if not keeps_image_token:
            content = _without(content, IMAGE_TOKEN)
        if name == "tokenizer.json":
            _join_merges(content["model"])
        write_json(out / name, content)
    if not (out / "tokenizer.json").is_file():
        raise ArtifactError(f"{checkpoint}: tokenizer.json is missing")


def _join_merges(model: dict[str, Any]) -> None:
    """Write pairs to merge as ``"a b"``: tokenizers before 0.20, which LLaVA's code pins, reads no lists. Pairs with
    blanks inside have no such form and stay."""
    merges = model.get("merges") or []
    if merges and all(isinstance(pair, list) and not any(" " in part for part in pair) for pair in merges):
        model["merges"] = [" ".join(pair) for pair in merges]


def _without(value: Any, token: str) -> Any:
    """A tokenizer's description without an added token."""

    def stays(item: Any) -> bool:
        return item != token and not (isinstance(item, dict) and item.get("content") == token)

    if isinstance(value, dict):
        return {key: _without(item, token) for key, item in value.items() if stays(item)}
    return [_without(item, token) for item in value if stays(item)] if isinstance(value, list) else value


def _save(tensors: Mapping[str, Tensor], path: Path, *, binary: bool) -> None:
    ordered = {name: tensors[name] for name in sorted(tensors)}
    if binary:
        torch.save(ordered, path)
    else:
        save_file(ordered, path, metadata={"format": "pt"})
    apply_umask(path)
