"""Up-cycling: a trained dense model becomes a sparse one with equal logits.

The feed-forward network of each chosen layer is copied into N experts (Komatsuzaki et al. 2022), and a fresh router
is added. Equal experts with weights that add up to one compute the dense network's output.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from mmpipe.errors import ArtifactError, ConfigError
from mmpipe.models.moe.context import connect
from mmpipe.models.moe.layer import MoELayer
from mmpipe.models.moe.placement import Site, chosen_sites, read
from mmpipe.models.moe.routers.base import build
from mmpipe.models.moe.spec import ModelPart, MoESettings
from mmpipe.models.vision_tower import enable_multi_scale, saved_scales


def upcycle(
    model: LlavaForConditionalGeneration, settings: MoESettings, *, seed: int = 0, part: ModelPart = "language_model"
) -> LlavaForConditionalGeneration:
    """Add experts to the chosen layers of a part of ``model``, in place; returns it.

    Router (and residual mixture) of each layer are drawn from a generator of their own, a function of ``seed``, the
    part and the layer. All else, dtype and device are unchanged. One part after the other can be
    up-cycled.

    Raises ConfigError for layers the part does not have, networks that cannot become experts, a part that already has
    experts, or settings the router does not take.
    """
    root = getattr(model.model, part)
    if any(isinstance(module, MoELayer) for module in root.modules()):
        raise ConfigError(f"the {part} already has experts; up-cycling starts from a dense one")
    if part == "vision_tower" and settings.compat == "fixed" and saved_scales(model) is None:
        enable_multi_scale(model, (1,))  # no stock class has such a tower, so its unused last layers are removed
    with torch.random.fork_rng(devices=[]):
        for site in chosen_sites(model, part, settings):
            site.put(_sparse(site, settings, seed, part))
    install(model, part, settings)
    return model


def install(model: LlavaForConditionalGeneration, part: ModelPart, settings: MoESettings) -> None:
    """Connect the MoE layers of a part with its forward passes, and write the settings into the model's configuration."""
    root = getattr(model.model, part)
    connect(root, part == "language_model")
    for name, module in root.named_modules():
        if isinstance(module, MoELayer):
            module.where = f"{part}.{name}".rstrip(".")
    saved = saved_moe_settings(model) | {part: settings}
    moe = {name: its.model_dump(mode="json", context={"identity": True}) for name, its in sorted(saved.items())}
    model.config.mmpipe = {**getattr(model.config, "mmpipe", {}), "moe": moe}


def saved_moe_settings(model: LlavaForConditionalGeneration) -> dict[ModelPart, MoESettings]:
    """The settings of each part with experts in the model's configuration."""
    saved = getattr(model.config, "mmpipe", {}).get("moe", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a checkpoint has the keys it was published with
        return {part: MoESettings(**settings) for part, settings in saved.items()}


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
        top_1 = any(isinstance(module, MoELayer) and module.router.top_k == 1 for module in sparse.modules())
        raise ArtifactError(
            f"the up-cycled model differs from its dense parent by {difference:.3g}, more than {tolerance:g}"
            + ("; a token with a single expert is weighed by its probability" if top_1 else "")
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


def empty_layer(site: Site, settings: MoESettings) -> MoELayer:
    """A MoE layer with the size, dtype and device of the dense network at ``site``, not initialised."""
    network = site.network
    dense = read(network, site.name)
    experts = dense.experts(settings.experts, site.activation)
    router = build(settings, dense.width)
    if router.ADDS and len(dense.tensors["down_proj"]) != dense.width:
        raise ConfigError(
            f"{site.name}: the router '{settings.router}' adds its input to the output, which has another width here; "
            "give this part another router"
        )
    layer = MoELayer(experts, router, settings, network if settings.residual else None)
    like = dense.tensors["down_proj"]
    return layer.to(device=like.device, dtype=like.dtype).train(network.training)


def _sparse(site: Site, settings: MoESettings, seed: int, part: ModelPart) -> MoELayer:
    """A MoE layer whose experts are copies of the dense network at ``site``; router and mixture are drawn."""
    layer = empty_layer(site, settings)
    with torch.no_grad():
        for name, tensor in read(site.network, site.name).tensors.items():
            expert = layer.experts.get_parameter(name)
            expert.copy_(tensor.expand_as(expert))
        # a hash keeps the numbers of neighbouring seeds and layers far apart
        digest = hashlib.sha256(f"{seed} {part} {'' if layer.router.starts_alike else site.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        # drawn in float32 on the CPU, so that device and dtype do not change the numbers
        fresh = copy.deepcopy(layer.router).to(device="cpu", dtype=torch.float32)
        fresh.reset_parameters(generator)
        layer.router.load_state_dict(fresh.state_dict())
        if layer.mixture is not None:
            bound = layer.router.width**-0.5
            for parameter in layer.mixture.parameters():
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    return layer
