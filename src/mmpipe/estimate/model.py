"""The model of a stage, as far as known before any download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpipe.artifacts.files import read_object
from mmpipe.estimate import tensors as count
from mmpipe.models.moe.spec import MoESettings, layer_indices
from mmpipe.stages.upcycle import Upcycle

if TYPE_CHECKING:
    from mmpipe.plan.plan import Plan, StagePlan

_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_PREFIXES = {"language_model": "language_model.layers", "vision_tower": "vision_tower.encoder.layers"}


@dataclass(frozen=True)
class Model:
    """Sizes of a vision-language model."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    tensors: count.Tensors
    top_k: Mapping[str, int]
    """Experts a token is sent to, by the layer's name; layers without experts are not named."""
    experts: Mapping[str, int]
    tokens_per_image: int

    @cached_property
    def parameters(self) -> int:
        """All elements."""
        return sum(self.tensors.values())

    def active(self, name: str) -> float:
        """Elements of a tensor that one token uses."""
        layer, inside, rest = name.partition(".mlp.")
        if inside and layer in self.experts and not rest.startswith("router"):
            return self.tensors[name] * self.top_k[layer] / self.experts[layer]
        return self.tensors[name]

    @property
    def networks(self) -> float:
        """Feed-forward networks that a token uses in a decoder layer, on average."""
        layers = self.text["num_hidden_layers"]
        extra = sum(k - 1 for name, k in self.top_k.items() if name.startswith("language_model"))
        return 1 + extra / layers


def model_of(plan: Plan, stage: StagePlan, root: Path = Path()) -> Model | None:
    """The model that a stage trains; None while the size of one of its parts is unknown."""
    parts = stage.vision_language.parts()
    whole = _config(plan, parts["checkpoint"], root) if "checkpoint" in parts else {}
    text = whole.get("text_config", whole) if whole else {}
    vision = whole.get("vision_config", {}) if whole else {}
    text = text if _known(text) else _config(plan, parts.get("language", ""), root)
    vision = vision if _known(vision) else _config(plan, parts.get("vision", ""), root)
    vision = vision.get("vision_config", vision)
    if not _known(text, "vocab_size") or not _known(vision, "image_size", "patch_size"):
        return None
    scales = len(stage.vision_language.scales)
    tensors = count.language(text) | count.tower(vision) | count.projector(vision, text, scales)
    model = Model(text, vision, tensors, {}, {}, count.image_tokens(vision))
    for before in stage.path():
        if isinstance(before.settings, Upcycle):
            for part, moe in before.settings.of_parts().items():
                model = _grown(model, part, moe)
    return model


def _grown(model: Model, part: str, moe: MoESettings) -> Model:
    """The model with experts in one part; a projector's are few enough to leave out."""
    if part not in _PREFIXES:
        return model
    config = model.text if part == "language_model" else model.vision
    layers = [f"{_PREFIXES[part]}.{i}" for i in layer_indices(moe.placement, config["num_hidden_layers"])]
    return replace(
        model,
        tensors=count.with_experts(model.tensors, layers, moe.experts, config["hidden_size"]),
        top_k={**model.top_k, **dict.fromkeys(layers, moe.top_k)},
        experts={**model.experts, **dict.fromkeys(layers, moe.experts)},
    )


def _config(plan: Plan, backbone: str, root: Path) -> Mapping[str, Any]:
    """A backbone's sizes from the catalogue, updated by its ``config.json`` once it is fetched."""
    if not backbone:
        return {}
    file = root / plan.backbone_directory(backbone) / "config.json"
    fetched: dict[str, Any] = read_object(file) if file.is_file() else {}
    told = plan.backbones[backbone].shape
    nested: dict[str, Any] = {
        key: {**told.get(key, {}), **fetched.get(key, {})}
        for key in ("text_config", "vision_config")
        if key in told or key in fetched
    }
    return {**told, **fetched, **nested}


def _known(config: Mapping[str, Any], *further: str) -> bool:
    return all(key in config for key in (*_NEEDED, *further))
