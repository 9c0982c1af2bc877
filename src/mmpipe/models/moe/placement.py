"""Where experts can stand in a vision-language model, and what dense networks they can be copied from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmpipe.errors import ConfigError
from mmpipe.models.moe.experts import ExpertsConfig, MLPExperts, SwiGLUExperts
from mmpipe.models.moe.patterns import layer_indices
from mmpipe.models.moe.spec import MoESettings, Part
from mmpipe.models.vision_tower import blocks, used_blocks

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


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


def chosen_sites(model: LlavaForConditionalGeneration, part: Part, settings: MoESettings) -> list[Site]:
    """The sites of a part of the model that ``settings.placement`` chooses.

    Layers of the vision tower behind the one whose output is projected do not count as layers: what they
    compute is thrown away. LibMoE (``reference``) gives experts to them, too.

    Raises ConfigError for layers that the part does not have.
    """
    sites = _SITES[part](model, settings)
    return [sites[i] for i in layer_indices(settings.placement, len(sites), part)]


def _language_model(model: LlavaForConditionalGeneration, settings: MoESettings) -> list[Site]:
    text = model.model.language_model
    return _layers(text.layers, text.config.hidden_act)


def _vision_tower(model: LlavaForConditionalGeneration, settings: MoESettings) -> list[Site]:
    layers = blocks(model.model.vision_tower)
    used = len(layers) if settings.compat == "reference" else used_blocks(model)
    return _layers(layers[:used], model.model.vision_tower.config.hidden_act)


def _projector(model: LlavaForConditionalGeneration, settings: MoESettings) -> list[Site]:
    return [Site(model.model, "multi_modal_projector", model.config.projector_hidden_act, "the projector")]


def _layers(layers: Any, activation: str) -> list[Site]:
    return [Site(layer, "mlp", activation, f"layer {i}") for i, layer in enumerate(layers)]


_SITES: dict[Part, Callable[[Any, MoESettings], list[Site]]] = {
    "language_model": _language_model,
    "vision_tower": _vision_tower,
    "multi_modal_projector": _projector,
}


@dataclass(frozen=True)
class Dense:
    """A dense network as the tensors of one expert."""

    kind: type[SwiGLUExperts] | type[MLPExperts]
    tensors: dict[str, Tensor]

    @property
    def width(self) -> int:
        first = self.tensors.get("gate_up_proj", self.tensors.get("up_proj"))
        assert first is not None
        return first.shape[1]

    def experts(self, number: int, activation: str) -> nn.Module:
        """Experts of this size; nothing in them has a value yet."""
        output, inner = self.tensors["down_proj"].shape
        return self.kind(ExpertsConfig(number, self.width, inner, activation, output))


def read(network: nn.Module, where: str) -> Dense:
    """Take a network apart: SwiGLU without biases, fused or not, or two linear layers with biases.

    Raises ConfigError when it is something else.
    """
    linear: dict[str, Any] = {name: child for name, child in network.named_children() if isinstance(child, nn.Linear)}
    weights = {name: layer.weight.detach() for name, layer in linear.items()}
    biases = [layer.bias is not None for layer in linear.values()]
    names = tuple(linear)
    if set(names) == {"gate_proj", "up_proj", "down_proj"} and not any(biases):
        fused = torch.cat([weights["gate_proj"], weights["up_proj"]])
        return Dense(SwiGLUExperts, {"gate_up_proj": fused, "down_proj": weights["down_proj"]})
    if set(names) == {"gate_up_proj", "down_proj"} and not any(biases):
        return Dense(SwiGLUExperts, weights)
    if names in (("fc1", "fc2"), ("linear_1", "linear_2")) and all(biases):
        first, second = linear.values()
        return Dense(
            MLPExperts,
            {
                "up_proj": first.weight.detach(),
                "up_proj_bias": first.bias.detach(),
                "down_proj": second.weight.detach(),
                "down_proj_bias": second.bias.detach(),
            },
        )
    described = ", ".join(f"{name} with{'' if bias else 'out'} bias" for name, bias in zip(names, biases, strict=True))
    raise ConfigError(
        f"{where}: a '{type(network).__name__}' with linear layers ({described}) cannot become experts; known are "
        "SwiGLU networks without biases and two linear layers with biases"
    )
