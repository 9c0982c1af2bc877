"""The base of every router: hidden states to choices, their weights, losses and measurements."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from mmpipe.errors import ConfigError, MmpipeError
from mmpipe.losses import routing
from mmpipe.models.moe.spec import ROUTERS, MoESettings, RouterSettings
from mmpipe.models.schedule import FollowsTraining
from mmpipe.registry import load_object

_REFERENCE_DEVIATION = 0.02


@dataclass(frozen=True)
class Routing:
    """The routing of T tokens. Everything but the indices is float32."""

    indices_TK: Tensor
    """Chosen experts, the first choice first."""
    weights_TK: Tensor
    """Weight of each choice."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Scalars by name; ``balance``, ``z`` and ``entropy`` are weighted by the layer's coefficients, others count as
    they are."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Detached measurements by name."""
    addition_TD: Tensor | None = None
    """The router's own addition to the output."""


class BaseRouter(FollowsTraining):
    """Base of all routers.

    A subclass defines ``forward(hidden_TD, sequence_T) -> Routing``, where ``sequence_T`` ``[T]``, if given, is the
    sequence of each token for losses taken per sequence, and may set ``Settings``, a subclass of ``RouterSettings``. It
    owns whatever parameters it needs; ``reset_parameters`` fills them from a generator, so that each layer starts
    differently and reproducibly. A schedule reads the current value of a setting from :meth:`scheduled`.
    """

    Settings: ClassVar[type[RouterSettings]] = RouterSettings
    """The settings of the class; the attribute has one name because a recipe names the router alone."""

    NORMALISED: ClassVar[bool] = True
    """Whether the weights of a token add up to one, which is then checked."""
    ADDS: ClassVar[bool] = False
    """Whether it adds a vector of the input's width to the output (``Routing.addition_TD``)."""
    STARTS_ALIKE: ClassVar[bool] = False
    """Whether ``compat: reference`` initialises every layer with the same numbers, as LibMoE 2.0 does."""

    def __init__(self, width: int, experts: int, top_k: int, settings: Any) -> None:
        super().__init__()
        self.width = width
        self.experts = experts
        self.top_k = top_k
        self.settings = settings

    @property
    def reference(self) -> bool:
        """Whether to reproduce the published code."""
        return getattr(self.settings, "compat", "fixed") == "reference"

    @property
    def starts_alike(self) -> bool:
        """Whether every layer is initialised with the same numbers."""
        return self.STARTS_ALIKE and self.reference

    @property
    def normalised(self) -> bool:
        """Whether the weights of a token add up to one with the current settings."""
        return self.NORMALISED

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw fresh parameters: uniform in +-1/sqrt(width), PyTorch's default for a linear layer; normal with
        deviation 0.02 in the reference of LibMoE 2.0."""
        with torch.no_grad():
            for parameter in self.parameters():
                if self.starts_alike:
                    parameter.normal_(std=_REFERENCE_DEVIATION, generator=generator)
                else:
                    parameter.uniform_(-(self.width**-0.5), self.width**-0.5, generator=generator)

    def forward(self, hidden_TD: Tensor, sequence_T: Tensor | None = None) -> Routing:
        raise NotImplementedError

    def scheduled(self, first: float, last: float) -> float:
        """The current value of a linear schedule from ``first`` to ``last`` over the training."""
        return first + (last - first) * self.progress if self.training else last


class LinearRouter(BaseRouter):
    """Scores each token by a matrix ``weight``, ``[N, D]`` unless a subclass changes :meth:`rows`."""

    def __init__(self, width: int, experts: int, top_k: int, settings: Any) -> None:
        super().__init__(width, experts, top_k, settings)
        self.weight = nn.Parameter(torch.empty(self.rows(), width))

    def rows(self) -> int:
        """Scores per token."""
        return self.experts


def linear_float(hidden_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """A linear map in float32, also under autocast: small differences decide the routing."""
    with torch.autocast(hidden_TD.device.type, enabled=False):
        bias_N = None if bias_N is None else bias_N.float()
        return F.linear(hidden_TD.float(), weight_ND.float(), bias_N)


def rescaled(weights_TK: Tensor) -> Tensor:
    """Weights that add up to one."""
    return weights_TK / weights_TK.sum(1, keepdim=True).clamp_min(torch.finfo(weights_TK.dtype).eps)


def routed(
    indices_TK: Tensor, weights_TK: Tensor, *, p_TN: Tensor, logits_TN: Tensor, sequence_T: Tensor | None = None
) -> Routing:
    """A routing with the usual losses and measurements of the probabilities ``p_TN``."""
    return Routing(
        indices_TK,
        weights_TK,
        losses={
            "balance": routing.load_balancing_loss(p_TN, indices_TK[:, 0], sequence_T),
            "z": routing.z_loss(logits_TN),
            "entropy": routing.entropy(p_TN),
        },
        statistics={"entropy": routing.entropy(p_TN.detach()), "margin": routing.margin(weights_TK.detach())},
    )


def build(settings: MoESettings, width: int) -> BaseRouter:
    """Make the router that ``settings`` name, for tokens of ``width``.

    Raises ConfigError for a router that does not exist, is no router, or does not take the given settings.
    """
    where = f"router '{settings.router}'"
    if ":" in settings.router:
        kind = load_object(settings.router, where)
    else:
        module = importlib.import_module(f"{ROUTERS}.{settings.router}")
        kind = next(
            value for value in vars(module).values() if _is_router(value) and value.__module__ == module.__name__
        )
    if not _is_router(kind):
        raise ConfigError(f"{where} is not a subclass of mmpipe.models.moe.routers.base.BaseRouter")
    try:
        own = kind.Settings(**settings.router_options)
    except ValidationError as error:
        raise ConfigError(f"{where}: router_settings: {error}") from error
    return kind(width, settings.experts, settings.top_k, own)


def _is_router(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseRouter)


class RouterError(MmpipeError):
    """A router's result is invalid."""


def check_shapes(router: BaseRouter, result: Routing, tokens: int, name: str) -> None:
    """Raise RouterError, opened by ``name``, unless the choices have the expected shape and type."""
    for what, tensor in (("indices", result.indices_TK), ("weights", result.weights_TK)):
        if tensor.ndim != 2 or len(tensor) != tokens:
            raise RouterError(f"{name}: {what} of shape {tuple(tensor.shape)} for {tokens} tokens")
    if result.indices_TK.shape != result.weights_TK.shape:
        raise RouterError(
            f"{name}: indices of shape {tuple(result.indices_TK.shape)} "
            f"with weights of shape {tuple(result.weights_TK.shape)}"
        )
    if result.indices_TK.dtype != torch.int64:
        raise RouterError(f"{name}: indices of type {result.indices_TK.dtype}, expected torch.int64")
    if not 1 <= result.indices_TK.shape[1] <= router.experts:
        raise RouterError(f"{name}: {result.indices_TK.shape[1]} choices a token, with {router.experts} experts")


def check_values(router: BaseRouter, result: Routing, name: str) -> None:
    """Raise RouterError, opened by ``name``, unless indices are in range and weights finite and, where declared,
    normalised."""
    if not len(result.indices_TK):
        return
    low, high = int(result.indices_TK.min()), int(result.indices_TK.max())
    if low < 0 or high >= router.experts:
        raise RouterError(f"{name}: experts {low} to {high} chosen, there are 0 to {router.experts - 1}")
    if not torch.isfinite(result.weights_TK).all():
        raise RouterError(f"{name}: weights that are not finite; are the hidden states or the router's weights?")
    error = (result.weights_TK.sum(1) - 1).abs().max().item() if router.normalised else 0.0
    if error > 1e-3:
        raise RouterError(f"{name}: the weights of a token add up to one, here they are off by {error:.2g}")
