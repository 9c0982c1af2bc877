"""Losses and measurements of a model's MoE layers after a forward pass."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from mmpipe.losses.routing import most_common_set_share
from mmpipe.models.moe.context import LayerReport, latest
from mmpipe.models.moe.layer import MoELayer

_COUNTS = ("load", "tokens", "dropped")


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers of a model by their names, in order."""
    return {
        name.removeprefix("model."): module for name, module in model.named_modules() if isinstance(module, MoELayer)
    }


def collect_losses(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Router losses of the last forward pass: ``(total, by name)``, weighed by their coefficients, summed or averaged
    over the layers of a part (``layer_losses``), averaged over scales; zero for a dense model. Losses by name are
    detached.

    Raises RuntimeError when the losses have no gradient although their routers train: reentrant gradient checkpointing
    loses it (``use_reentrant=False`` keeps it).
    """
    parts: dict[str, list[Tensor]] = {}
    layers = moe_layers(model)
    in_part = Counter(part_of(name) for name in layers)
    for layer_name, reports in _reports(model).items():
        layer = layers[layer_name]
        mean = layer.settings.layer_losses == "mean"
        share = 1 / len(reports) / (in_part[part_of(layer_name)] if mean else 1)
        trains = any(p.requires_grad for p in layer.router.parameters())
        for name, loss in (item for report in reports for item in report.losses.items()):
            parts.setdefault(name, []).append(loss * share if share != 1 else loss)
            if torch.is_grad_enabled() and layer.training and trains and not loss.requires_grad:
                raise RuntimeError(
                    "the router losses have no gradient; with gradient checkpointing, set "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
    sums = {name: torch.stack(losses).sum() for name, losses in parts.items()}
    if not sums:
        return next(model.parameters()).new_zeros((), dtype=torch.float32), {}
    return torch.stack(list(sums.values())).sum(), {name: value.detach() for name, value in sums.items()}


def collect_statistics(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Measurements of the last forward pass by the layer's name.

    ``load`` ``[N]`` (choices each expert computed), ``tokens``, ``dropped`` (choices), and the router's own:
    usually ``entropy`` and ``margin``. Counts are summed over scales, the rest is averaged over their tokens.
    """
    return {name: _together([report.statistics for report in reports]) for name, reports in _reports(model).items()}


def part_of(layer: str) -> str:
    """The part of the model that a layer belongs to, by the layer's name."""
    return layer.partition(".")[0]


def collect_collapse(model: nn.Module) -> dict[str, Tensor]:
    """Share of the last forward pass's tokens with the layer's most common ordered choice of experts, by the layer's
    name; near one, the layer has collapsed."""
    layers = moe_layers(model)
    return {
        name: most_common_set_share(
            torch.cat([report.indices_TK for report in reports]), layers[name].router.experts + 1
        )
        for name, reports in _reports(model).items()
    }


def _reports(model: nn.Module) -> dict[str, list[LayerReport]]:
    """The reports of each layer by its name, one for every pass of the last call."""
    passes = latest(model)
    found = {
        name: [current.reports[id(layer)] for current in passes if id(layer) in current.reports]
        for name, layer in moe_layers(model).items()
    }
    return {name: reports for name, reports in found.items() if reports}


def _together(statistics: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(statistics) == 1:
        return statistics[0]
    tokens = torch.stack([each["tokens"] for each in statistics])
    together = {}
    for name in statistics[0]:
        values = torch.stack([each[name] for each in statistics])
        counted = name in _COUNTS
        together[name] = values.sum(0) if counted else (values * tokens).sum(0) / tokens.sum().clamp_min(1)
    return together
