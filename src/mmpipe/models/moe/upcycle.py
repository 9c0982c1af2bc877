"""Up-cycling: a trained dense model becomes a sparse one that computes the same.

The feed-forward network of each chosen layer is copied into N experts (Komatsuzaki et al. 2022) and a fresh
router is put before them. With weights that add up to one, equal experts give what one of them gives, so the
sparse model starts exactly where the dense one stood.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmpipe.errors import ArtifactError, ConfigError
from mmpipe.models.moe.experts import ExpertsConfig, SwiGLUExperts
from mmpipe.models.moe.forward_pass import begin, discard
from mmpipe.models.moe.layer import MoELayer
from mmpipe.models.moe.placement import layer_indices
from mmpipe.models.moe.routers.base import build
from mmpipe.models.moe.spec import MoESettings

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


def upcycle(
    model: LlavaForConditionalGeneration, settings: MoESettings, *, seed: int = 0
) -> LlavaForConditionalGeneration:
    """Put experts into the chosen layers of ``model``'s language model, in place; returns it.

    Router (and residual mixture) of each layer are drawn from a generator of their own, a function of
    ``seed`` and the layer. Everything else, the dtype and the device stay as they are.

    Raises ConfigError for layers the model does not have, networks that are no plain SwiGLU, a model that
    already has experts, or settings the router does not take.
    """
    if any(isinstance(module, MoELayer) for module in model.modules()):
        raise ConfigError("this model already has experts; up-cycling starts from a dense one")
    text = model.model.language_model
    with torch.random.fork_rng(devices=[]):
        for index in layer_indices(settings.placement, len(text.layers)):
            layer = text.layers[index]
            generator = layer_generator(seed, index)
            layer.mlp = _sparse(layer.mlp, text.config.hidden_act, settings, f"layer {index}", generator)
    install(model, settings)
    return model


def install(model: LlavaForConditionalGeneration, settings: MoESettings) -> None:
    """Connect the MoE layers that stand in a model with its attention mask, and note the settings in its
    config."""
    text = model.model.language_model
    text.register_forward_pre_hook(begin, with_kwargs=True)
    for layer in text.layers:
        hook = layer.mlp.take_forward_pass if isinstance(layer.mlp, MoELayer) else discard
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    model.config.mmpipe = {"moe": settings.model_dump(mode="json")}


def layer_generator(seed: int, layer: int) -> torch.Generator:
    """The random numbers of one layer: far apart for neighbouring seeds and layers."""
    digest = hashlib.sha256(f"router {seed} {layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def assert_equal_to_parent(
    dense: LlavaForConditionalGeneration | Tensor,
    sparse: LlavaForConditionalGeneration,
    batch: Mapping[str, Tensor],
    tolerance: float = 1e-5,
) -> float:
    """Check that a fresh sparse model gives its dense parent's logits; returns the largest difference.

    ``dense`` is the parent, or :func:`logits` it gave for ``batch`` before it was up-cycled in place.
    Differences are measured at real tokens, relative to the largest logit when that is above one.

    Raises ArtifactError when the difference exceeds ``tolerance``.
    """
    expected = dense if isinstance(dense, Tensor) else logits(dense, batch)
    difference = ((logits(sparse, batch) - expected).abs().max() / expected.abs().max().clamp_min(1)).item()
    if not difference <= tolerance:
        raise ArtifactError(
            f"the up-cycled model differs from its dense parent by {difference:.3g}, more than {tolerance:g}"
            + ("; a token with a single expert is weighed by its probability" if _top_1(sparse) else "")
        )
    return difference


@torch.no_grad()
def logits(model: LlavaForConditionalGeneration, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits in evaluation mode at the real tokens of ``batch``, ``[tokens, vocabulary]``, float32."""
    was_training = model.training
    model.eval()
    try:
        result = model(**batch, use_cache=False).logits.float()
    finally:
        model.train(was_training)
    mask = batch.get("attention_mask")
    return result.flatten(0, 1) if mask is None else result[mask.bool()]


def _top_1(model: nn.Module) -> bool:
    return any(isinstance(module, MoELayer) and module.router.top_k == 1 for module in model.modules())


def empty_layer(dense: nn.Module, activation: str, settings: MoESettings, where: str) -> MoELayer:
    """A MoE layer of the size, dtype and device of a dense network; nothing in it has a value yet."""
    gate_up_FD, down_DF = swiglu_weights(dense, where)
    width, inner = down_DF.shape
    experts = SwiGLUExperts(ExpertsConfig(settings.experts, width, inner, activation))
    layer = MoELayer(experts, build(settings, width), settings, dense if settings.residual else None)
    return layer.to(device=gate_up_FD.device, dtype=gate_up_FD.dtype).train(dense.training)


def _sparse(
    dense: nn.Module, activation: str, settings: MoESettings, where: str, generator: torch.Generator
) -> MoELayer:
    layer = empty_layer(dense, activation, settings, where)
    gate_up_FD, down_DF = swiglu_weights(dense, where)
    experts: Any = layer.experts
    with torch.no_grad():
        experts.gate_up_proj.copy_(gate_up_FD.expand_as(experts.gate_up_proj))
        experts.down_proj.copy_(down_DF.expand_as(experts.down_proj))
        _draw(layer, generator)
    return layer


def _draw(layer: MoELayer, generator: torch.Generator) -> None:
    """Fill what is fresh; drawn in float32 on the CPU, so that device and dtype do not change the numbers."""
    fresh = copy.deepcopy(layer.router).to(device="cpu", dtype=torch.float32)
    fresh.reset_parameters(generator)
    layer.router.load_state_dict(fresh.state_dict())
    if layer.mixture is not None:
        bound = layer.router.width**-0.5
        for parameter in layer.mixture.parameters():
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def swiglu_weights(mlp: nn.Module, where: str) -> tuple[Tensor, Tensor]:
    """Gate over up projection ``[2F, D]`` and down projection ``[D, F]`` of a SwiGLU network, fused or not.

    Raises ConfigError when it is something else.
    """
    linear: dict[str, Any] = {
        name: child for name, child in mlp.named_children() if isinstance(child, nn.Linear)
    }
    if set(linear) == {"gate_proj", "up_proj", "down_proj"}:
        gate_up = torch.cat([linear["gate_proj"].weight.detach(), linear["up_proj"].weight.detach()])
    elif set(linear) == {"gate_up_proj", "down_proj"}:
        gate_up = linear["gate_up_proj"].weight.detach()
    else:
        raise ConfigError(
            f"{where}: a '{type(mlp).__name__}' with linear layers {sorted(linear)} cannot become experts; "
            "known are SwiGLU networks (gate_proj, up_proj, down_proj, or gate_up_proj, down_proj)"
        )
    if any(layer.bias is not None for layer in linear.values()):
        raise ConfigError(f"{where}: a '{type(mlp).__name__}' with biases cannot become experts")
    return gate_up, linear["down_proj"].weight.detach()
