"""Handing an object to the decoder layers for one forward pass of a text model.

The object travels as a keyword argument of every decoder layer, and into its attention, so nothing stays in the model
between two calls. Gradient checkpointing wraps a layer's ``forward``: hooks of the layer itself run once, those of its
attention again when the layer is computed again during the backward pass, with the same object, even if other forward
passes came in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
HookResult = tuple[Args, Kwargs]
Receiver = Callable[[Any, Any, Args, Kwargs], HookResult]
"""A module's use of its context (None: the pass has none): ``(module, context, args, kwargs) -> (args, kwargs)``."""


def hand_over(
    text: nn.Module,
    keyword: str,
    begin: Callable[[Any, Args, Kwargs], HookResult],
    receivers: Iterable[tuple[nn.Module, Receiver | None]],
) -> None:
    """Connect a text model with the modules that take the context which ``begin``, its pre-hook, puts under
    ``keyword``.

    ``receivers`` names a module of every decoder layer; it never sees the keyword itself. None ignores the context.
    """
    text.register_forward_pre_hook(begin, with_kwargs=True)
    for module, receiver in receivers:
        module.register_forward_pre_hook(partial(_receive, keyword, receiver), with_kwargs=True)


def _receive(keyword: str, receiver: Receiver | None, module: nn.Module, args: Args, kwargs: Kwargs) -> HookResult:
    others = {key: value for key, value in kwargs.items() if key != keyword}
    return receiver(module, kwargs.get(keyword), args, others) if receiver else (args, others)


def input_of(args: Args, kwargs: Kwargs) -> Tensor:
    """What a text model was called with: embeddings ``[B, L, D]`` or token ids ``[B, L]``."""
    given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args)
    return next(value for value in given if isinstance(value, Tensor))
