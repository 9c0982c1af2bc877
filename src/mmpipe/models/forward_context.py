"""A context object passed to the decoder layers for one forward pass of a text model.

The object is a keyword argument of every decoder layer and its attention, so no state remains in the model
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
"""A module's pre-hook with its context (None: no context): ``(module, context, args, kwargs) -> (args, kwargs)``."""


def hand_over(
    text: nn.Module,
    keyword: str,
    begin: Callable[[Any, Args, Kwargs], HookResult],
    receivers: Iterable[tuple[nn.Module, Receiver | None]],
) -> None:
    """Connect a text model with the modules that receive the context of ``begin``, its pre-hook, as ``keyword``.

    ``receivers`` lists a module of every decoder layer and its receiver; with None the module ignores the context.
    """
    text.register_forward_pre_hook(begin, with_kwargs=True)
    for module, receiver in receivers:
        module.register_forward_pre_hook(partial(_receive, keyword, receiver), with_kwargs=True)


def _receive(keyword: str, receiver: Receiver | None, module: nn.Module, args: Args, kwargs: Kwargs) -> HookResult:
    others = {key: value for key, value in kwargs.items() if key != keyword}
    return receiver(module, kwargs.get(keyword), args, others) if receiver else (args, others)


def input_of(args: Args, kwargs: Kwargs) -> Tensor:
    """The input of a text model: embeddings ``[B, L, D]`` or token ids ``[B, L]``."""
    given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args)
    return next(value for value in given if isinstance(value, Tensor))
