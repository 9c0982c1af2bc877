"""Sparse models as stock checkpoints: text ``qwen2_moe`` or ``mixtral``, which transformers opens by itself.

* ``mixtral`` is chosen when every layer has experts, attention has no biases and k > 1; ``qwen2_moe`` otherwise, with
  the dense layers in ``mlp_only_layers``.
* ``norm_topk_prob`` is true for k > 1; its default, false, would be another function.
* ``qwen2_moe`` always has a shared expert. It is written with 64 inner units and a down projection of zeros, so that it
  adds exactly zero; with no units at all, vLLM does not find its tensors.
* Experts are written one by one, as transformers 4 did. Phi-3's fused projections are split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, MixtralConfig, PreTrainedConfig, Qwen2MoeConfig

from mmpipe.errors import ArtifactError
from mmpipe.models.moe.experts import ExpertsConfig, SwiGLUExperts
from mmpipe.models.moe.hooks import Place, place_of
from mmpipe.models.moe.layer import MoELayer
from mmpipe.models.moe.routers.base import build
from mmpipe.models.moe.routers.topk import TopKRouter
from mmpipe.models.moe.spec import MoESettings
from mmpipe.models.moe.upcycle import install, saved_moe_settings
from mmpipe.models.vision_tower import saved_scales

SHARED_EXPERT_UNITS = 64
_COMMON = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps use_cache tie_word_embeddings rope_parameters "
    "attention_dropout pad_token_id bos_token_id eos_token_id"
)
"""Settings common to dense and sparse language models."""


@dataclass(frozen=True)
class Names:
    """The names of a stock family for the tensors of a layer of experts."""

    router: str
    gate: str
    up: str
    down: str

    def rename(self, part: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """Our tensor ``part`` of a decoder layer under the family's names."""
        if part == "mlp.router.weight":
            return [(self.router, tensor)]
        if part == "mlp.experts.down_proj":
            pieces = {self.down: tensor}
        else:
            pieces = dict(zip((self.gate, self.up), tensor.chunk(2, dim=1), strict=True))
        return [(name.format(i), weight) for name, experts in pieces.items() for i, weight in enumerate(experts)]


QWEN2_MOE = Names("mlp.gate.weight", *(f"mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")))
MIXTRAL = Names(
    "block_sparse_moe.gate.weight", *(f"block_sparse_moe.experts.{{}}.{name}.weight" for name in ("w1", "w3", "w2"))
)


def sparse_layers(model: LlavaForConditionalGeneration) -> dict[int, MoELayer]:
    """The MoE layers of the language model by their index."""
    layers = model.model.language_model.layers
    return {i: layer.mlp for i, layer in enumerate(layers) if isinstance(layer.mlp, MoELayer)}


def why_not_stock(model: LlavaForConditionalGeneration) -> str | None:
    """Why a model has no stock class; None when it has one."""
    if saved_scales(model) not in (None, (1,)):
        return f"images are seen at the scales {saved_scales(model)}, which no stock class does"
    elsewhere = sorted(set(saved_moe_settings(model)) - {"language_model"})
    if elsewhere:
        return f"there are experts in the {' and the '.join(elsewhere)}, where no stock class has any"
    for index, layer in sparse_layers(model).items():
        if not isinstance(layer.router, TopKRouter):
            return f"layer {index} has the router '{layer.settings.router}', which no stock class has"
        if layer.router.settings.second_choice == "gumbel_always":
            return f"layer {index} samples experts in evaluation, which no stock class does"
        if layer.dense is not None:
            return f"layer {index} mixes its experts with a dense network, which no stock class does"
    return None


def text_config(model: LlavaForConditionalGeneration) -> PreTrainedConfig:
    """The stock configuration of the language model of a sparse model.

    Raises ArtifactError when its attention has no counterpart in the stock sparse families.
    """
    text, layers = model.config.get_text_config(), sparse_layers(model)
    if text.model_type in (Qwen2MoeConfig.model_type, MixtralConfig.model_type):
        return text
    _require_plain_attention(model)
    settings = next(iter(layers.values())).settings
    fields = {name: getattr(text, name) for name in _COMMON.split()}
    fields["head_dim"] = _head_size(text)
    if getattr(text, "original_max_position_embeddings", None) is not None:
        fields["original_max_position_embeddings"] = text.original_max_position_embeddings
    if _is_mixtral(model):
        return MixtralConfig(
            **fields,
            sliding_window=getattr(text, "sliding_window", None),
            num_local_experts=settings.experts,
            num_experts_per_tok=settings.top_k,
            router_aux_loss_coef=settings.balance_coefficient,
        )
    return Qwen2MoeConfig(
        **fields,
        **_window(text),
        num_experts=settings.experts,
        num_experts_per_tok=settings.top_k,
        moe_intermediate_size=text.intermediate_size,
        shared_expert_intermediate_size=SHARED_EXPERT_UNITS,
        norm_topk_prob=settings.top_k > 1,
        decoder_sparse_step=1,
        mlp_only_layers=[i for i in range(text.num_hidden_layers) if i not in layers],
        router_aux_loss_coef=settings.balance_coefficient,
        qkv_bias=_has_query_bias(model),
    )


def tensors(model: LlavaForConditionalGeneration) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a sparse model by the names a stock model has in memory, experts one by one."""
    text, prefix = model.config.get_text_config(), "model.language_model.layers."
    names, sparse = MIXTRAL if _is_mixtral(model) else QWEN2_MOE, sparse_layers(model)
    for name, tensor in model.state_dict().items():
        if not name.startswith(prefix):
            yield name, tensor
            continue
        index, _, part = name.removeprefix(prefix).partition(".")
        renamed = names.rename if int(index) in sparse and part.startswith("mlp.") else partial(_unfused, text)
        yield from ((f"{prefix}{index}.{new}", piece) for new, piece in renamed(part, tensor))
    if names is QWEN2_MOE:
        for i, layer in sparse.items():
            yield from ((f"{prefix}{i}.mlp.{name}", tensor) for name, tensor in _shared_expert(layer))


def replace_moe_blocks(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Replace a loaded model's stock MoE blocks by our layers, in place and with the same tensors; returns it.

    A stock model whose arithmetic ours does not cover (a shared expert that adds something, weights that are not
    rescaled) is left as it is. Raises ArtifactError when its configuration marks it as written by mmpipe: it is
    damaged.
    """
    text = model.model.language_model
    blocks = {i: layer.mlp for i, layer in enumerate(text.layers) if hasattr(layer.mlp, "experts")}
    if not blocks or sparse_layers(model):
        return model
    saved = saved_moe_settings(model).get("language_model")
    problem = next(filter(None, (_why_not_ours(block, text.config) for block in blocks.values())), None)
    if problem and saved:
        raise ArtifactError(f"the checkpoint was written as up-cycled experts, but {problem}")
    if problem:
        return model
    settings = saved or MoESettings(
        experts=next(iter(blocks.values())).experts.num_experts,
        top_k=text.config.num_experts_per_tok,
        placement=tuple(blocks),
    )
    for index, block in blocks.items():
        experts, width, inner = block.experts.down_proj.shape
        with torch.device("meta"):
            ours = SwiGLUExperts(ExpertsConfig(experts, width, inner, text.config.hidden_act))
            router = build(settings, width)
        ours.gate_up_proj, ours.down_proj = block.experts.gate_up_proj, block.experts.down_proj
        router.weight = block.gate.weight
        text.layers[index].mlp = MoELayer(ours, router, settings).train(block.training)
    install(model, "language_model", settings)
    return model


def router_tensors(directory: Path) -> dict[tuple[Place, str], Any]:
    """The tensors of all routers of a checkpoint as float32 arrays, by place and name (``weight``, ...), without
    loading the model.

    Stock checkpoints and those of this package's class alike; empty for a dense one.
    """
    stock = tuple(f".{names.router}" for names in (QWEN2_MOE, MIXTRAL))
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                _, ours, name = key.partition(".router.")
                if ours or key.endswith(stock):
                    # files have ``language_model.model.layers`` or ``model.language_model.layers``
                    place = place_of(key.removeprefix("model."))
                    found[place, name or "weight"] = tensors.get_tensor(key).float().numpy()
    return dict(sorted(found.items()))


def _why_not_ours(block: Any, config: PreTrainedConfig) -> str | None:
    shared = getattr(block, "shared_expert", None)
    if shared is not None and shared.down_proj.weight.any():
        return "it has a shared expert that adds something"
    if not isinstance(getattr(block.gate, "weight", None), nn.Parameter) or block.experts.down_proj.ndim != 3:
        return f"its '{type(block).__name__}' is built in another way"
    rescaled = getattr(config, "norm_topk_prob", True)
    if rescaled != (config.num_experts_per_tok > 1):
        return f"with {config.num_experts_per_tok} experts a token, norm_topk_prob is {rescaled}"
    return None


def _is_mixtral(model: LlavaForConditionalGeneration) -> bool:
    text, layers = model.config.get_text_config(), sparse_layers(model)
    if text.model_type in ("mixtral", "qwen2_moe"):
        return text.model_type == "mixtral"
    top_k = next(iter(layers.values())).settings.top_k
    return len(layers) == text.num_hidden_layers and top_k > 1 and not _has_query_bias(model)


def _has_query_bias(model: LlavaForConditionalGeneration) -> bool:
    attention = model.model.language_model.layers[0].self_attn
    return getattr(attention, "q_proj", attention.o_proj).bias is not None


def _require_plain_attention(model: LlavaForConditionalGeneration) -> None:
    text = model.config.get_text_config()
    attention = dict(model.model.language_model.layers[0].self_attn.named_modules())
    known = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"}
    weighted = {name for name, module in attention.items() if any(True for _ in module.parameters(recurse=False))}
    if weighted - known or attention["o_proj"].bias is not None:
        raise ArtifactError(
            f"no stock sparse model has the attention of '{text.model_type}' (parts {sorted(weighted)}, "
            f"output bias: {attention['o_proj'].bias is not None})"
        )
    if (text.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        raise ArtifactError("no stock sparse model rotates a part of each head only (partial_rotary_factor)")


def _window(text: PreTrainedConfig) -> dict[str, Any]:
    """Sliding-window settings of ``qwen2_moe`` for a text model with or without a window."""
    window = getattr(text, "sliding_window", None)
    if window is None:
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "layer_types": getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers,
        "max_window_layers": getattr(text, "max_window_layers", 0),
    }


def _shared_expert(layer: MoELayer) -> Iterator[tuple[str, Tensor]]:
    width = layer.router.width
    like = cast(Tensor, layer.experts.down_proj)
    for name, shape in (
        ("shared_expert.gate_proj.weight", (SHARED_EXPERT_UNITS, width)),
        ("shared_expert.up_proj.weight", (SHARED_EXPERT_UNITS, width)),
        ("shared_expert.down_proj.weight", (width, SHARED_EXPERT_UNITS)),
        ("shared_expert_gate.weight", (1, width)),
    ):
        yield name, torch.zeros(shape, dtype=like.dtype, device=like.device)


def _head_size(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _unfused(text: Any, part: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Split Phi-3's fused projections; other tensors are unchanged."""
    if part == "self_attn.qkv_proj.weight":
        head = _head_size(text)
        heads = (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
        pieces = tensor.split([n * head for n in heads])
        return [(f"self_attn.{letter}_proj.weight", piece) for letter, piece in zip("qkv", pieces, strict=True)]
    if part == "mlp.gate_up_proj.weight":
        gate, up = tensor.chunk(2)
        return [("mlp.gate_proj.weight", gate), ("mlp.up_proj.weight", up)]
    return [(part, tensor)]
