"""Reading losses and measurements of a model's MoE layers after a forward pass, and moving its routers on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mmpipe.models.moe.forward_pass import Report, latest
from mmpipe.models.moe.layer import MoELayer


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers of a model by their names, in order."""
    return {
        name.removeprefix("model."): module
        for name, module in model.named_modules()
        if isinstance(module, MoELayer)
    }


def collect_losses(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Router losses of the last forward pass: ``(total, by name)``, weighed by their coefficients, summed
    over layers.

    The parts by name are detached. Call it after each forward pass that is trained on. Zero for a dense
    model.

    Raises RuntimeError when the losses have no gradient although their routers train: reentrant gradient
    checkpointing loses it (``use_reentrant=False`` keeps it).
    """
    parts: dict[str, list[Tensor]] = {}
    for layer, report in _reports(model):
        for name, loss in report.losses.items():
            parts.setdefault(name, []).append(loss)
            trains = any(p.requires_grad for p in layer.router.parameters())
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

    ``load`` ``[N]`` (choices each expert carried out), ``tokens``, ``dropped`` (choices), and what the router
    reports: usually ``entropy`` and ``margin``.
    """
    names = {id(layer): name for name, layer in moe_layers(model).items()}
    return {names[id(layer)]: report.statistics for layer, report in _reports(model)}


def step_routers(model: nn.Module, progress: float) -> None:
    """Tell every router how far training is, from 0 to 1."""
    for layer in moe_layers(model).values():
        layer.router.step(progress)


def _reports(model: nn.Module) -> Iterator[tuple[MoELayer, Report]]:
    passes = latest(model)
    for layer in moe_layers(model).values():
        for current in passes:
            if id(layer) in current.reports:
                yield layer, current.reports[id(layer)]
