"""Hooks on a model's experts: recording the choices, and leaving out each token's first choice."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from mmpipe.errors import ConfigError
from mmpipe.models.moe.collect import moe_layers
from mmpipe.models.moe.layer import MoELayer
from mmpipe.models.moe.routers.base import Routing, rescaled


@dataclass(frozen=True, order=True)
class Place:
    """The position of a MoE layer in the model."""

    part: str
    """``language_model``, ``vision_tower`` or ``multi_modal_projector``."""
    layer: int
    """Index of the layer in its part; 0 for a projector, which has no layers."""
    experts: int = field(default=0, compare=False)
    """Number of experts."""


@dataclass(frozen=True)
class Choices:
    """A router's decision in one call: experts and weights ``[T, K]`` of its T input tokens."""

    indices_TK: Tensor
    weights_TK: Tensor

    def __len__(self) -> int:
        return len(self.indices_TK)


def placed_layers(model: nn.Module, layers: Collection[int] | None = None) -> dict[Place, MoELayer]:
    """The MoE layers of a model by their place, those numbered ``layers`` only if given.

    A projector is always included: its layers have no numbers. Raises ConfigError for a number that no layer
    with experts has.
    """
    found = {place_of(name, layer.router.experts): layer for name, layer in moe_layers(model).items()}
    if layers is None:
        return found
    numbered = {place.layer for place in found if place.part != "multi_modal_projector"}
    if missing := sorted(set(layers) - numbered):
        raise ConfigError(
            f"log_experts: layers: {missing} have no experts; layers with experts: {sorted(numbered) or 'none'}"
        )
    return {
        place: layer for place, layer in found.items() if place.layer in layers or place.part == "multi_modal_projector"
    }


def place_of(name: str, experts: int = 0) -> Place:
    """The place of a module or tensor named ``{part}.(...).{layer}.(...)``."""
    part, *inner = name.split(".")
    return Place(part, next((int(piece) for piece in inner if piece.isdigit()), 0), experts)


class Recorder:
    """Records the choices of the given layers' routers, call by call, until they are collected."""

    def __init__(self, layers: dict[Place, MoELayer]) -> None:
        self._calls: dict[Place, list[Choices]] = {}
        self._handles = [
            layer.router.register_forward_hook(partial(self._record, place)) for place, layer in layers.items()
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _record(self, place: Place, router: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
        choices = Choices(routing.indices_TK.detach(), routing.weights_TK.detach())
        self._calls.setdefault(place, []).append(choices)

    def take(self) -> dict[Place, list[Choices]]:
        """The calls since the last collection."""
        taken, self._calls = self._calls, {}
        return taken


@contextmanager
def without_first(model: nn.Module) -> Iterator[None]:
    """Context manager that leaves out each token's first choice in every MoE layer.

    The other choices are rescaled to the total weight of all, where the router's weights add up to one.
    A token with a single expert passes through the residual stream only.
    """

    def leave_out(layer: MoELayer, experts: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        hidden_TD, indices_TK, weights_TK = args
        left_TK = weights_TK.clone()
        left_TK[:, 0] = 0
        return hidden_TD, indices_TK, rescaled(left_TK) if layer.router.normalised else left_TK

    layers = moe_layers(model).values()
    handles = [layer.experts.register_forward_pre_hook(partial(leave_out, layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
