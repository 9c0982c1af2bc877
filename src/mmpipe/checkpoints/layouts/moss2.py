"""MOSS2 (fnlp/moss2-2_5b-chat): a Llama with other tensor names, and queries, keys and values in one matrix.

The files follow InternLM2's layout: https://huggingface.co/fnlp/moss2-2_5b-chat (``modeling_moss2.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaTokenizer, PreTrainedTokenizerBase

from mmpipe.checkpoints.layouts.base import PackedLanguage, unreadable_tokenizer
from mmpipe.errors import ArtifactError
from mmpipe.pretrained import load_pretrained

_NAMES = {
    "model.tok_embeddings.": "model.embed_tokens.",
    "output.": "lm_head.",
    ".attention.wo.": ".self_attn.o_proj.",
    ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w3.": ".mlp.up_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
}
_PACKED = ".attention.wqkv."
_COPIED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings rms_norm_eps hidden_act initializer_range tie_word_embeddings bos_token_id eos_token_id "
    "pad_token_id"
)


class Moss2(PackedLanguage):
    """The language model of LLaVA-MOSS2, also inside a ``llava_moss2`` checkpoint."""

    MODEL_TYPES = ("Moss2", "moss2", "llava_moss2")

    def config(self, written: Mapping[str, Any]) -> LlamaConfig:
        """The equivalent configuration of Llama. Takes the old ``rope_scaling`` and the new ``rope_parameters``."""
        scaling = written.get("rope_parameters") or written.get("rope_scaling") or {}
        rope = {key: value for key, value in scaling.items() if key not in ("type", "rope_type")}
        rope["rope_type"] = scaling.get("rope_type", scaling.get("type", "default"))
        rope.setdefault("rope_theta", written.get("rope_theta", 10000))
        return LlamaConfig(
            **{key: written[key] for key in _COPIED.split() if key in written},
            attention_bias=bool(written.get("bias", False)),
            rope_parameters=rope,
            architectures=["LlamaForCausalLM"],
        )

    def written(self, config: Any) -> dict[str, Any]:
        rope = dict(config.rope_parameters)
        kind = rope.pop("rope_type", "default")
        theta = rope.pop("rope_theta")
        return {
            **{key: getattr(config, key) for key in _COPIED.split()},
            "architectures": ["Moss2ForCausalLM"],
            "attn_implementation": "eager",
            "bias": config.attention_bias,
            "rope_theta": theta,
            "rope_scaling": None if kind == "default" else {"type": kind, **rope},
            "use_cache": True,
        }

    def to_stock(self, tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            before, packed, after = name.partition(_PACKED)
            if not packed:
                named[_renamed(name, _NAMES)] = tensor
                continue
            pieces = zip("qkv", _unpack(name, tensor, config), strict=True)
            named |= {f"{before}.self_attn.{part}_proj.{after}": piece for part, piece in pieces}
        return named

    def from_stock(self, tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        back = {ours: theirs for theirs, ours in _NAMES.items()}
        named: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            before, query, after = name.partition(".self_attn.q_proj.")
            if query:
                parts = [tensors[f"{before}.self_attn.{part}_proj.{after}"] for part in "qkv"]
                named[f"{before}{_PACKED}{after}"] = _pack(parts, config)
            elif ".self_attn.k_proj." not in name and ".self_attn.v_proj." not in name:
                named[_renamed(name, back)] = tensor
        return named

    def tokenizer(self, directory: Path) -> PreTrainedTokenizerBase:
        """The tokenizer of ``tokenizer.model``, a sentencepiece model used as Llama uses its own."""
        try:
            return load_pretrained(LlamaTokenizer, directory, add_bos_token=True, pad_token="</s>")
        except (ImportError, OSError, ValueError) as error:
            raise unreadable_tokenizer(directory, error) from error


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        # a key that begins with a dot is inside a layer, others are prefixes
        if old in name if old.startswith(".") else name.startswith(old):
            return name.replace(old, new, 1)
    return name


def _unpack(name: str, packed: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Split rows ``[for each key-value head: its query heads, key, value]`` into three matrices (or biases)."""
    kv, rest = config.num_key_value_heads, packed.shape[1:]
    groups = config.num_attention_heads // kv
    if packed.shape[0] % (kv * (groups + 2)):
        raise ArtifactError(
            f"{name}: {packed.shape[0]} rows cannot hold {groups} queries, a key and a value for each of {kv} heads"
        )
    heads = packed.view(kv, groups + 2, -1, *rest)
    pieces = (heads[:, :groups], heads[:, groups], heads[:, groups + 1])
    query, key, value = (piece.reshape(-1, *rest).contiguous() for piece in pieces)
    return query, key, value


def _pack(parts: list[Tensor], config: Any) -> Tensor:
    """The inverse of :func:`_unpack`."""
    kv, rest = config.num_key_value_heads, parts[0].shape[1:]
    size = parts[1].shape[0] // kv
    return torch.cat([part.view(kv, -1, size, *rest) for part in parts], dim=1).reshape(-1, *rest)


LAYOUT = Moss2()
