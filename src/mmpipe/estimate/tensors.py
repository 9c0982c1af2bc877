"""The tensors of a vision-language model, by name and size, from the ``config.json`` of its parts.

Names are those that recipes use in ``trainable``: ``language_model.layers.0.mlp.up_proj.weight``. Tied embeddings are
one tensor. Covers what Llama, Qwen2, Phi-3 (its fused projections cut apart) and CLIP and SigLIP towers have in common;
sparsification's predictors (a few million) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ModelConfig = Mapping[str, Any]
Tensors = dict[str, int]
"""Elements by name."""

_QKV_BIAS = ("qwen2", "qwen2_moe")
"""Model types whose query, key and value projections have biases that ``config.json`` does not state."""


def heads(config: ModelConfig) -> tuple[int, int]:
    """Widths of all queries and of all keys: ``heads * head_dim`` and ``key_value_heads * head_dim``."""
    count = config["num_attention_heads"]
    each = config.get("head_dim") or config["hidden_size"] // count
    return count * each, (config.get("num_key_value_heads") or count) * each


def language(config: ModelConfig) -> Tensors:
    """A decoder with RMS norms and gated feed-forward networks, embeddings and head included."""
    hidden, inner, vocabulary = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    query, key = heads(config)
    bias = config.get("attention_bias", config.get("model_type") in _QKV_BIAS)
    tensors: Tensors = {"language_model.embed_tokens.weight": vocabulary * hidden}
    for index in range(config["num_hidden_layers"]):
        layer = f"language_model.layers.{index}"
        for name, rows in (("q", query), ("k", key), ("v", key)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = rows * hidden
            if bias:
                tensors[f"{layer}.self_attn.{name}_proj.bias"] = rows
        tensors[f"{layer}.self_attn.o_proj.weight"] = hidden * query
        for name in ("gate", "up", "down"):
            tensors[f"{layer}.mlp.{name}_proj.weight"] = inner * hidden
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = hidden
    tensors["language_model.norm.weight"] = hidden
    if not config.get("tie_word_embeddings", False):
        tensors["lm_head.weight"] = vocabulary * hidden
    return tensors


def tower(config: ModelConfig) -> Tensors:
    """A ViT as CLIP and SigLIP have it: biases everywhere, a class token in CLIP, no pooling head."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    clip = "clip" in config.get("model_type", "clip")
    root = "vision_tower"
    tensors: Tensors = {
        f"{root}.embeddings.patch_embedding.weight": config.get("num_channels", 3) * config["patch_size"] ** 2 * hidden,
        f"{root}.embeddings.position_embedding.weight": (image_tokens(config) + clip) * hidden,
    }
    if clip:
        tensors[f"{root}.embeddings.class_embedding"] = hidden
    else:
        tensors[f"{root}.embeddings.patch_embedding.bias"] = hidden
    for index in range(config["num_hidden_layers"]):
        layer = f"{root}.encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= _affine(f"{layer}.self_attn.{name}", hidden * hidden, hidden)
        tensors |= _affine(f"{layer}.mlp.fc1", hidden * inner, inner) | _affine(
            f"{layer}.mlp.fc2", hidden * inner, hidden
        )
        tensors |= _affine(f"{layer}.layer_norm1", hidden, hidden) | _affine(f"{layer}.layer_norm2", hidden, hidden)
    if clip:
        tensors |= _affine(f"{root}.pre_layrnorm", hidden, hidden)
    return tensors | _affine(f"{root}.post_layernorm", hidden, hidden)


def projector(vision: ModelConfig, text: ModelConfig, scales: int = 1) -> Tensors:
    """Two linear layers; features of several scales are concatenated."""
    width, hidden = vision["hidden_size"] * scales, text["hidden_size"]
    root = "multi_modal_projector"
    return _affine(f"{root}.linear_1", width * hidden, hidden) | _affine(f"{root}.linear_2", hidden * hidden, hidden)


def with_experts(tensors: Tensors, layers: Sequence[str], experts: int, width: int) -> Tensors:
    """The same model with each feed-forward network of ``layers`` (names, without ``.mlp``) made into ``experts``
    copies and a linear router of ``width`` inputs."""
    inside = tuple(f"{layer}.mlp." for layer in layers)
    grown = {name: size * (experts if name.startswith(inside) else 1) for name, size in tensors.items()}
    return grown | {f"{layer}.mlp.router.weight": experts * width for layer in layers}


def adapters(tensors: Tensors, chosen: Sequence[str], rank: int, config: ModelConfig) -> Tensors:
    """Low-rank adapters (arXiv 2106.09685) on the linear layers ``chosen`` (names without ``.weight``):
    ``rank * (inputs + outputs)`` elements each; one side of every layer is as wide as the model."""
    hidden = config["hidden_size"]
    return {f"{name}.lora_A.default.weight": rank * (hidden + tensors[f"{name}.weight"] // hidden) for name in chosen}


def image_tokens(vision: ModelConfig) -> int:
    """Patches of one image."""
    return (vision["image_size"] // vision["patch_size"]) ** 2


def _affine(name: str, weight: int, bias: int) -> Tensors:
    return {f"{name}.weight": weight, f"{name}.bias": bias}
