"""The settings of a mixture of experts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mmpipe.models.moe.patterns import Placement
from mmpipe.models.moe.routers.names import check_name
from mmpipe.settings import Settings

Part = Literal["language_model", "vision_tower", "multi_modal_projector"]
"""The parts of a vision-language model that can have experts."""


class MoESettings(Settings):
    """Experts, where they stand and how tokens find them; the defaults are LLaVA-MoD's, without dropping
    tokens."""

    experts: int = Field(4, ge=2)
    """Experts a layer; each starts as a copy of the layer's dense network."""
    top_k: int = Field(2, ge=1)
    """Experts a token is sent to."""
    placement: Placement = "sparse"
    """``sparse`` (layers 0, 2, 4, ...), ``first_half``, ``second_half``, ``dense`` (all) or a list of
    layers."""
    router: str = "topk"
    """A router of ``mmpipe.models.moe.routers``, or ``package.module:Class`` of your own."""
    router_settings: dict[str, Any] = Field(default_factory=dict)
    """What the router's own ``Settings`` take."""
    capacity_factor: float | None = Field(None, gt=0)
    """In training, an expert takes at most this many times its even share of choices, the rest is dropped
    (LLaVA-MoD: 1.5). None drops nothing, as evaluation never does."""
    minimum_capacity: int = Field(0, ge=0)
    """Choices an expert may take however small the batch."""
    balance_coefficient: float = Field(0.01, ge=0)
    """Weight of the load-balancing loss."""
    balance_within: Literal["batch", "sequence"] = "batch"
    """Ask for balance over all tokens of a batch, or within every sequence (LibMoE)."""
    z_coefficient: float = Field(0.0, ge=0)
    """Weight of the router z-loss."""
    entropy_coefficient: float = 0.0
    """Weight of the mean entropy of the routing distribution: above zero it makes choices surer, below more even."""
    layer_losses: Literal["sum", "mean"] = "sum"
    """Router losses are summed over the layers of a part, or averaged (LibMoE)."""
    residual: bool = False
    """Mix the experts' output with that of the dense network, which stays beside them (DeepSpeed's residual
    MoE)."""
    compat: Literal["fixed", "reference"] = "fixed"
    """``reference``: as LLaVA-MoD trains. Padding is routed and counted like any token, and ``topk`` draws the second
    expert (``second_choice: gumbel``) unless ``router_settings`` say otherwise or ask for LibMoE's ``form: reference``."""

    @model_validator(mode="after")
    def _consistent(self) -> MoESettings:
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}, but there are only {self.experts} experts")
        check_name(self.router)
        return self

    @property
    def router_options(self) -> dict[str, Any]:
        """``router_settings``, and what ``compat`` adds to them."""
        draws = self.compat == "reference" and self.router == "topk"
        if draws and self.router_settings.get("form") != "reference":
            return {"second_choice": "gumbel", **self.router_settings}
        return self.router_settings
