"""The settings of a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from mmpipe import registry
from mmpipe.errors import ConfigError, did_you_mean
from mmpipe.settings import Settings, renamed_keys

ROUTERS = "mmpipe.models.moe.routers"
"""The package of the routers: a file each, whose name is the router's."""

ROUTER_VERSIONS = {"hyper": 2}
"""Versions of routers whose results have changed; part of an up-cycled model's identity."""

ModelPart = Literal["language_model", "vision_tower", "multi_modal_projector"]
"""The parts of a vision-language model that can have experts."""

Placement = Literal["sparse", "first_half", "second_half", "dense"] | tuple[int, ...]

_NAMED: dict[str, Callable[[int], range]] = {
    "sparse": lambda layers: range(0, layers, 2),
    "first_half": lambda layers: range(layers // 2),
    "second_half": lambda layers: range(layers // 2, layers),
    "dense": lambda layers: range(layers),
}


class RouterSettings(Settings):
    """What every router takes."""

    FORMER_KEYS: ClassVar[Mapping[str, str]] = {"form": "compat"}

    compat: Literal["fixed", "reference"] = "fixed"
    """``reference`` reproduces the published code, including its errors."""

    @property
    def form(self) -> str:
        """The former name of ``compat``, for routers written for it."""
        return self.compat


class MoESettings(Settings):
    """Experts, their placement and their router; the defaults are LLaVA-MoD's, without dropping tokens."""

    experts: int = Field(4, ge=2)
    """Experts a layer; each starts as a copy of the layer's dense network."""
    top_k: int = Field(2, ge=1)
    """Experts a token is sent to."""
    placement: Placement = "sparse"
    """``sparse`` (layers 0, 2, 4, ...), ``first_half``, ``second_half``, ``dense`` (all) or a list of layers."""
    router: str = "topk"
    """A router of ``mmpipe.models.moe.routers``, or ``package.module:Class`` of your own."""
    router_settings: dict[str, Any] = Field(default_factory=dict)
    """Values for the router's own ``Settings``."""
    capacity_factor: float | None = Field(None, gt=0)
    """In training, an expert takes at most this many times its even share of choices, the rest is dropped
    (LLaVA-MoD: 1.5). None drops nothing, as evaluation never does."""
    minimum_capacity: int = Field(0, ge=0)
    """Least capacity of an expert, in choices."""
    balance_coefficient: float = Field(0.01, ge=0)
    """Weight of the load-balancing loss."""
    balance_within: Literal["batch", "sequence"] = "batch"
    """Balance over all tokens of a batch, or within every sequence (LibMoE)."""
    z_coefficient: float = Field(0.0, ge=0)
    """Weight of the router z-loss."""
    entropy_coefficient: float = 0.0
    """Weight of the mean entropy of the routing distribution: positive values sharpen it, negative ones flatten it."""
    layer_losses: Literal["sum", "mean"] = "sum"
    """Router losses are summed over the layers of a part, or averaged (LibMoE)."""
    residual: bool = False
    """Mix the experts' output with that of the dense network, which stays beside them (DeepSpeed's residual MoE)."""
    compat: Literal["fixed", "reference"] = "fixed"
    """``reference``: as LLaVA-MoD trains. Padding is routed and counted like any token, and ``topk`` draws the second
    expert (``second_choice: gumbel``) unless ``router_settings`` set another value or LibMoE's code
    (``compat: reference`` there)."""

    FORMER_KEYS_OF: ClassVar[Mapping[str, type[BaseModel]]] = {"router_settings": RouterSettings}

    @field_validator("router_settings", mode="before")
    @classmethod
    def _read_former_router_keys(cls, value: Any) -> Any:
        return renamed_keys(RouterSettings, value) if isinstance(value, dict) else value

    @model_serializer(mode="wrap")
    def _with_former_keys(self, serialise: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        content = super()._with_former_keys(serialise, info)
        if (info.context or {}).get("identity") and "router_settings" in content:
            content["router_settings"] = with_former_keys(content["router_settings"])
        return content

    @model_validator(mode="after")
    def _consistent(self) -> MoESettings:
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}, but there are only {self.experts} experts")
        if ":" in self.router:
            try:
                registry.source_file(self.router)
            except ConfigError as error:
                raise ValueError(f"router '{self.router}': {error}") from None
        elif self.router not in (known := registry.names(ROUTERS)):
            raise ValueError(f"there is no router '{self.router}'{did_you_mean(self.router, known)}")
        return self

    @property
    def router_options(self) -> dict[str, Any]:
        """``router_settings``, with those that ``compat`` implies."""
        draws = self.compat == "reference" and self.router == "topk"
        if draws and self.router_settings.get("compat") != "reference":
            return {"second_choice": "gumbel", **self.router_settings}
        return self.router_settings


def with_former_keys(router_settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a router under the keys used in specs and published checkpoints."""
    former = {new: old for old, new in RouterSettings.FORMER_KEYS.items()}
    return {former.get(key, key): value for key, value in router_settings.items()}


def layer_indices(placement: Placement, layers: int, of: str = "model") -> list[int]:
    """Indices, ascending, of the layers with experts in a model (``of`` names it) of ``layers`` layers.

    ``sparse`` is every second layer from the first on; ``dense`` is all. The names are LLaVA-MoD's.

    Raises ConfigError for explicit indices that are missing, doubled or out of range.
    """
    if isinstance(placement, str):
        return list(_NAMED[placement](layers))
    if not placement:
        raise ConfigError("placement: name at least one layer")
    if len(set(placement)) < len(placement):
        raise ConfigError(f"placement: {list(placement)} names a layer twice")
    outside = [i for i in placement if not 0 <= i < layers]
    if outside:
        raise ConfigError(f"placement: the {of} has layers 0 to {layers - 1}, not {outside}")
    return sorted(placement)
