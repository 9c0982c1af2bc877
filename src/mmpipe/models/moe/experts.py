"""Experts as fused tensors, for transformers' expert backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

AUTOMATIC = "mmpipe_automatic"
_GROUP_ALIGNMENT = 16
"""Bytes; rows of grouped matrix products must start at multiples of this."""


@dataclass
class ExpertsConfig:
    """Sizes of the experts of one layer, and the backend to compute them with."""

    experts: int
    width: int
    inner: int
    activation: str = "silu"
    output: int | None = None
    """Output width, when it is not ``width`` (a projector's)."""
    _experts_implementation: str = AUTOMATIC
    """``mmpipe_automatic``, ``eager`` or any name transformers knows (``grouped_mm``, ``batched_mm``, ...)."""


@use_experts_implementation
class SwiGLUExperts(nn.Module):
    """N networks ``down(act(gate(x)) * up(x))`` without biases.

    ``gate_up_proj`` is ``[N, 2F, D]``, gate before up, ``down_proj`` is ``[N, D, F]``: the layout of
    transformers' MoE models.
    """

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        self.num_experts = config.experts
        self.act_fn = ACT2FN[config.activation]
        self.gate_up_proj = nn.Parameter(torch.empty(config.experts, 2 * config.inner, config.width))
        self.down_proj = nn.Parameter(torch.empty(config.experts, config.width, config.inner))

    def forward(self, hidden_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum of each token's chosen experts, ``[T, D]``, one expert after the other, in any dtype.

        This is the backend ``eager``; the decorator replaces it by the configured one.
        """
        return loop(self, hidden_TD, indices_TK, weights_TK)


@use_experts_implementation(has_gate=False, has_bias=True)
class MLPExperts(nn.Module):
    """N networks ``down(act(up(x)))`` with biases, as vision towers and projectors have them.

    ``up_proj`` is ``[N, F, D]``, ``down_proj`` ``[N, D, F]``, with ``up_proj_bias`` and ``down_proj_bias``.
    """

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        self.num_experts = config.experts
        self.act_fn = ACT2FN[config.activation]
        self.up_proj = nn.Parameter(torch.empty(config.experts, config.inner, config.width))
        self.up_proj_bias = nn.Parameter(torch.empty(config.experts, config.inner))
        output = config.output or config.width
        self.down_proj = nn.Parameter(torch.empty(config.experts, output, config.inner))
        self.down_proj_bias = nn.Parameter(torch.empty(config.experts, output))

    def forward(self, hidden_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum of each token's chosen experts, ``[T, D]``; see :class:`SwiGLUExperts`."""
        return loop(self, hidden_TD, indices_TK, weights_TK)


def _network(experts: SwiGLUExperts | MLPExperts, x: Tensor, linear: Callable[[Tensor, str], Tensor]) -> Tensor:
    """The network of the experts, whose layers ``linear(x, name)`` computes."""
    if isinstance(experts, MLPExperts):
        return linear(experts.act_fn(linear(x, "up_proj")), "down_proj")
    gate, up = linear(x, "gate_up_proj").chunk(2, dim=-1)
    return linear(experts.act_fn(gate) * up, "down_proj")


def loop(self: SwiGLUExperts | MLPExperts, hidden_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Compute expert by expert."""
    output_TD = hidden_TD.new_zeros(len(hidden_TD), self.down_proj.shape[1])
    for expert in range(self.num_experts):

        def linear(x: Tensor, name: str, i: int = expert) -> Tensor:
            bias_NF = getattr(self, f"{name}_bias", None)
            return F.linear(x, getattr(self, name)[i], None if bias_NF is None else bias_NF[i])

        tokens, choice = torch.where(indices_TK == expert)
        result = _network(self, hidden_TD[tokens], linear)
        output_TD = output_TD.index_add(0, tokens, (result * weights_TK[tokens, choice, None]).to(output_TD.dtype))
    return output_TD


def automatic(self: SwiGLUExperts | MLPExperts, hidden_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Grouped matrix products where torch has them, the loop elsewhere (float64, sizes that are not aligned).

    Autocast does not cover grouped products, which would then run in the weights' float32. So its dtype is taken here,
    for input, weights and output, as it is for a linear layer.
    """
    device = hidden_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.down_proj.dtype
    aligned = all(n * dtype.itemsize % _GROUP_ALIGNMENT == 0 for n in self.down_proj.shape[1:])
    if not aligned or dtype == torch.float64 or not len(hidden_TD):
        return loop(self, hidden_TD, indices_TK, weights_TK)
    with torch.autocast(device, enabled=False):
        return grouped(self, hidden_TD, indices_TK, weights_TK, dtype)


def grouped(
    self: SwiGLUExperts | MLPExperts, hidden_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype
) -> Tensor:
    """All experts at once: tokens sorted by expert, one grouped product a layer of the networks.

    The tokens per expert are not copied to the CPU.
    """
    experts_S, order_S = indices_TK.flatten().sort(stable=True)
    place_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    every_N = torch.arange(self.num_experts, device=experts_S.device)
    ends_N = torch.searchsorted(experts_S, every_N, right=True, out_int32=True)

    def linear(x: Tensor, name: str) -> Tensor:
        result = F.grouped_mm(x, getattr(self, name).to(dtype).transpose(1, 2), offs=ends_N)
        bias_NF = getattr(self, f"{name}_bias", None)
        return result if bias_NF is None else result + bias_NF.to(dtype).index_select(0, experts_S)

    rows_SD = _Dispatch.apply(hidden_TD.to(dtype), order_S, place_S, indices_TK.shape[1])
    return _Combine.apply(_network(self, rows_SD, linear), weights_TK.to(dtype), order_S, place_S)


class _Dispatch(torch.autograd.Function):
    """A copy of each token for each of its choices, in the order of the experts.

    The gradient of a token is the sum over its k copies: a gather and a sum. Autograd would use a
    scatter into rows that occur k times, which is slow on a CPU and not deterministic on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, order_S: Tensor, place_S: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(place_S)
        ctx.k = k
        return hidden_TD.index_select(0, order_S // k)

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None, None]:
        (place_S,) = ctx.saved_tensors
        return grad_SD.index_select(0, place_S).unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """The weighted sum of each token's k results; its gradients are gathers, too."""

    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, weights_TK: Tensor, order_S: Tensor, place_S: Tensor) -> Tensor:
        chosen_TKD = rows_SD.index_select(0, place_S).unflatten(0, weights_TK.shape)
        ctx.save_for_backward(chosen_TKD, weights_TK, order_S)
        return torch.bmm(weights_TK[:, None], chosen_TKD).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        chosen_TKD, weights_TK, order_S = ctx.saved_tensors
        grad_weights_TK = torch.bmm(chosen_TKD, grad_TD[:, :, None]).squeeze(2)
        grad_rows_SD = grad_TD.index_select(0, order_S // weights_TK.shape[1])
        grad_rows_SD = grad_rows_SD * weights_TK.flatten().index_select(0, order_S)[:, None]
        return grad_rows_SD, grad_weights_TK, None, None


ALL_EXPERTS_FUNCTIONS.register(AUTOMATIC, automatic)
