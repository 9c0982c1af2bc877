"""Placement of experts in a vision-language model, and the dense networks they can be copied from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from mmpipe.errors import ConfigError
from mmpipe.models.moe.experts import ExpertsConfig, MLPExperts, SwiGLUExperts
from mmpipe.models.moe.spec import ModelPart, MoESettings, layer_indices
from mmpipe.models.vision_tower import blocks, used_blocks


@dataclass(frozen=True)
class Site:
    """A place in a model that holds a feed-forward network."""

    owner: nn.Module
    attribute: str
    activation: str
    name: str

    @property
    def network(self) -> nn.Module:
        return getattr(self.owner, self.attribute)

    def put(self, network: nn.Module) -> None:
        setattr(self.owner, self.attribute, network)


def chosen_sites(model: LlavaForConditionalGeneration, part: ModelPart, settings: MoESettings) -> list[Site]:
    """The sites of a part of the model that ``settings.placement`` chooses.

    Layers of the vision tower after the one whose output is projected are not counted: their output is not
    used. LibMoE (``reference``) gives experts to them, too.

    Raises ConfigError for layers that the part does not have.
    """
    if part == "multi_modal_projector":
        sites = [Site(model.model, part, model.config.projector_hidden_act, "the projector")]
    else:
        root = getattr(model.model, part)
        layers: Any = blocks(root) if part == "vision_tower" else root.layers
        if part == "vision_tower" and settings.compat == "fixed":
            layers = layers[: used_blocks(model)]
        sites = [Site(layer, "mlp", root.config.hidden_act, f"layer {i}") for i, layer in enumerate(layers)]
    return [sites[i] for i in layer_indices(settings.placement, len(sites), part)]


@dataclass(frozen=True)
class DenseNetwork:
    """A dense network as the tensors of one expert."""

    kind: type[SwiGLUExperts] | type[MLPExperts]
    tensors: dict[str, Tensor]

    @property
    def width(self) -> int:
        first = self.tensors.get("gate_up_proj", self.tensors.get("up_proj"))
        assert first is not None
        return first.shape[1]

    def experts(self, number: int, activation: str) -> nn.Module:
        """Experts of this size, not initialised."""
        output, inner = self.tensors["down_proj"].shape
        return self.kind(ExpertsConfig(number, self.width, inner, activation, output))


def read(network: nn.Module, where: str) -> DenseNetwork:
    """Read a network's tensors: SwiGLU without biases, fused or not, or two linear layers with biases.

    Raises ConfigError when it is something else.
    """
    linear: dict[str, Any] = {name: child for name, child in network.named_children() if isinstance(child, nn.Linear)}
    weights = {name: layer.weight.detach() for name, layer in linear.items()}
    biases = [layer.bias is not None for layer in linear.values()]
    names = tuple(linear)
    if set(names) == {"gate_proj", "up_proj", "down_proj"} and not any(biases):
        fused = torch.cat([weights["gate_proj"], weights["up_proj"]])
        return DenseNetwork(SwiGLUExperts, {"gate_up_proj": fused, "down_proj": weights["down_proj"]})
    if set(names) == {"gate_up_proj", "down_proj"} and not any(biases):
        return DenseNetwork(SwiGLUExperts, weights)
    if names in (("fc1", "fc2"), ("linear_1", "linear_2")) and all(biases):
        ours = dict(zip(("up_proj", "down_proj"), linear.values(), strict=True))
        biased = {f"{name}_bias": layer.bias.detach() for name, layer in ours.items()}
        return DenseNetwork(MLPExperts, {name: layer.weight.detach() for name, layer in ours.items()} | biased)
    described = ", ".join(f"{name} with{'' if bias else 'out'} bias" for name, bias in zip(names, biases, strict=True))
    raise ConfigError(
        f"{where}: a '{type(network).__name__}' with linear layers ({described}) cannot become experts; known are "
        "SwiGLU networks without biases and two linear layers with biases"
    )
