"""Trainable parameters and their learning rates, by glob patterns of their names.

Names are those of the model without the leading ``model.``: ``language_model.layers.0.mlp.up_proj.weight``,
``multi_modal_projector.linear_1.bias``, ``lm_head.weight``. ``*`` also matches dots. A tensor with several
names (tied embeddings) matches by each of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mmpipe.errors import ConfigError


def select(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Make the parameters that match a pattern trainable and freeze all others; returns the trainable names.

    Raises ConfigError for a pattern that matches nothing: a misspelt name would silently freeze its parameters.
    """
    named = _named(model)
    chosen = {name for pattern in patterns for name in matching(pattern, named)}
    for parameter in named.values():
        parameter.requires_grad_(False)
    for name in chosen:
        named[name].requires_grad_(True)
    return [name for name, parameter in named.items() if parameter.requires_grad]


def learning_rate_groups(
    model: nn.Module, *, base: float, others: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters, each with its ``lr`` and ``weight_decay``.

    ``others`` maps patterns to learning rates, the last match wins; the default is ``base``. Biases and
    normalisation weights, which have one dimension, are not decayed.

    Raises ConfigError when a pattern matches nothing, or when nothing trains.
    """
    named = _named(model)
    rates = {id(parameter): base for parameter in named.values()}
    for pattern, rate in others.items():
        rates |= {id(named[name]): rate for name in matching(pattern, named)}

    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (rates[id(parameter)], weight_decay if parameter.ndim > 1 else 0.0)
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ConfigError("nothing trains: 'trainable' selects no parameter of this model")
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name.removeprefix("model."): parameter for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def matching(pattern: str, names: Iterable[str], what: str = "parameter") -> list[str]:
    """The names that a pattern matches. Raises ConfigError, with the nearest names, when there is none."""
    names = list(names)
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
        raise ConfigError(f"the pattern '{pattern}' matches no {what}; the nearest names: {', '.join(near)}")
    return found
