"""The names of LLaVA's tensors and those of the stock model, both ways.

LLaVA (haotian-liu/LLaVA, ``llava/model/``) nests tower and projector in the language model's body:
``model.layers.*``, ``model.mm_projector.{0,2}.*``, ``model.vision_tower.vision_tower.vision_model.*``, ``lm_head.*``.
MoE-LLaVA and LLaVA-MoD use ``image_tower`` and ``mm_projector.image_spatial_proj``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar

T = TypeVar("T")

TOWER: Final = "model.vision_tower."
PROJECTOR: Final = "model.multi_modal_projector."
LANGUAGE: Final = "model.language_model."

_TO_STOCK = {
    "model.vision_tower.vision_tower.vision_model.": TOWER,
    "model.vision_tower.vision_tower.": TOWER,
    "model.image_tower.image_tower.vision_model.": TOWER,
    "model.image_tower.image_tower.": TOWER,
    "model.mm_projector.image_spatial_proj.0.": f"{PROJECTOR}linear_1.",
    "model.mm_projector.image_spatial_proj.2.": f"{PROJECTOR}linear_2.",
    "model.mm_projector.0.": f"{PROJECTOR}linear_1.",
    "model.mm_projector.2.": f"{PROJECTOR}linear_2.",
    "model.": LANGUAGE,
}
_FROM_DISK = {
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "vision_tower.vision_model.": "model.vision_tower.vision_tower.vision_model.",
    "vision_tower.": "model.vision_tower.vision_tower.",
    "language_model.": "",
}
_OTHER_PARTS = ("model.vision_tower.", "model.image_tower.", "model.mm_projector.")
_BUFFERS = (".position_ids", ".rotary_emb.inv_freq")
"""Buffers that older transformers wrote beside the weights and newer ones compute."""


def is_buffer(name: str) -> bool:
    """Whether a tensor is computed, not trained."""
    return name.endswith(_BUFFERS)


def split_language(tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """The language model's tensors of a LLaVA checkpoint, and those of tower and projector."""
    language = {name: tensor for name, tensor in tensors.items() if not name.startswith(_OTHER_PARTS)}
    return language, {name: tensor for name, tensor in tensors.items() if name not in language}


def to_stock(name: str) -> str:
    """The stock model's name for a tensor of LLaVA's.

    >>> to_stock("model.mm_projector.2.bias")
    'model.multi_modal_projector.linear_2.bias'
    >>> to_stock("model.layers.0.mlp.up_proj.weight")
    'model.language_model.layers.0.mlp.up_proj.weight'
    """
    return renamed(name, _TO_STOCK)


def to_llava(name: str) -> str:
    """LLaVA's name for a tensor in our checkpoint files.

    >>> to_llava("vision_tower.vision_model.post_layernorm.bias")
    'model.vision_tower.vision_tower.vision_model.post_layernorm.bias'
    >>> to_llava("language_model.model.norm.weight")
    'model.norm.weight'
    """
    return renamed(name, _FROM_DISK)


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """``name`` with the first of ``prefixes`` that it begins with replaced."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
