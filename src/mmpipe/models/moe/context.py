"""Context of the MoE layers in one forward pass: which tokens count, and each layer's report.

A layer's input is hidden states only. It gets the text model's attention mask, and returns its losses, through a
:class:`ForwardPass` made for every call of the text model (see :mod:`mmpipe.models.forward_context`). A layer that
gradient checkpointing recomputes leaves its existing report unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmpipe.models.forward_context import Args, HookResult, Kwargs, hand_over, input_of

KEYWORD = "moe_forward_pass"
_COUNTS: ContextVar[bool] = ContextVar("images_count", default=True)


@dataclass(frozen=True)
class LayerReport:
    """Losses and measurements of one layer in one forward pass."""

    losses: dict[str, Tensor]
    """Scalars, weighted: their sum is the layer's share of the total loss."""
    statistics: dict[str, Tensor]
    """Detached: ``load`` ``[N]`` (choices an expert took), ``tokens``, ``dropped`` (choices), and the router's own."""
    indices_TK: Tensor
    """The choices; N is a null choice."""


class ForwardPass:
    """Shared by the MoE layers of one call of a model.

    ``rows_T`` are the indices of the tokens that count in the batch flattened to B*L, None when all do; ``reports`` are
    by the ``id`` of the layer.
    """

    def __init__(self, rows_T: Tensor | None = None) -> None:
        self.rows_T = rows_T
        self.reports: dict[int, LayerReport] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardPass:
        """A copied model has no forward pass yet (and graphs cannot be copied)."""
        return ForwardPass()

    @classmethod
    def of_mask(cls, mask: Any, length: int) -> ForwardPass:
        """From an attention mask ``[B, at least length]`` of ones and zeros; its last columns are the current tokens.

        Without such a mask (none, or one already prepared for attention) every token counts.
        """
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return cls()
        real_T = mask[:, -length:].bool().flatten()
        return cls() if bool(real_T.all()) else cls(real_T.nonzero().squeeze(1))

    def narrowed(self, real_BM: Tensor) -> ForwardPass:
        """The same pass for the retained tokens, of which ``real_BM`` count."""
        left = ForwardPass.of_mask(real_BM, real_BM.shape[1])
        left.reports = self.reports
        return left


class TakesForwardPass(nn.Module):
    """A module that reads the current forward pass and adds its report."""

    forward_pass: ForwardPass | None = None

    def take(self, attention: nn.Module, current: ForwardPass | None, args: Args, kwargs: Kwargs) -> HookResult:
        """Receiver at the attention of the same decoder layer, which runs before this module."""
        self.forward_pass = current
        return args, kwargs


def connect(root: Any, is_text_model: bool) -> None:
    """Connect the modules of a part with a new forward pass in every call of the part."""
    if not is_text_model:
        root.register_forward_pre_hook(_begin_unmasked)
        return
    receivers = ((layer.self_attn, getattr(layer.mlp, "take", None)) for layer in root.layers)
    hand_over(root, KEYWORD, _begin, receivers)


def _begin(text_model: nn.Module, args: Args, kwargs: Kwargs) -> HookResult:
    current = ForwardPass.of_mask(kwargs.get("attention_mask"), input_of(args, kwargs).shape[1])
    text_model.moe_forward_passes = [current]  # type: ignore[assignment]
    return args, kwargs | {KEYWORD: current}


def _begin_unmasked(root: nn.Module, args: Args) -> None:
    """Pre-hook of a part without padding (tower, projector): one forward pass for all of its layers."""
    root.moe_forward_passes = []  # type: ignore[assignment]
    next_pass(root)


def next_pass(root: nn.Module) -> None:
    """Begin another pass of a part within the same call (its images at another scale), if it has experts."""
    passes: Any = getattr(root, "moe_forward_passes", None)
    if passes is None:
        return
    passes.append(ForwardPass(None if _COUNTS.get() else torch.empty(0, dtype=torch.long)))
    for module in root.modules():
        if isinstance(module, TakesForwardPass):
            module.forward_pass = passes[-1]


@contextmanager
def nothing_counts() -> Iterator[None]:
    """Exclude the placeholder image of a batch without images from routing and losses in tower and projector."""
    token = _COUNTS.set(False)
    try:
        yield
    finally:
        _COUNTS.reset(token)


def latest(model: nn.Module) -> list[ForwardPass]:
    """The forward passes of the last call of every part of ``model`` that has experts."""
    calls: Any = (getattr(module, "moe_forward_passes", ()) for module in model.modules())
    return [current for passes in calls for current in passes]
