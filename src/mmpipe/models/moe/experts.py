"""Experts as fused tensors, computed by transformers' expert backends."""

from __future__ import annotations

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
    """``mmpipe_automatic``, ``eager`` or any name transformers knows (``grouped_mm``, ``batched_mm``,
    ...)."""


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

        This is the backend ``eager``; the decorator puts the configured one in its place.
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


def _network(experts: SwiGLUExperts | MLPExperts, i: int, x: Tensor) -> Tensor:
    if isinstance(experts, MLPExperts):
        inner = experts.act_fn(F.linear(x, experts.up_proj[i], experts.up_proj_bias[i]))
        return F.linear(inner, experts.down_proj[i], experts.down_proj_bias[i])
    gate, up = F.linear(x, experts.gate_up_proj[i]).chunk(2, dim=-1)
    return F.linear(experts.act_fn(gate) * up, experts.down_proj[i])


def loop(
    self: SwiGLUExperts | MLPExperts, hidden_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Compute expert by expert."""
    output_TD = hidden_TD.new_zeros(len(hidden_TD), self.down_proj.shape[1])
    for expert in range(self.num_experts):
        tokens, choice = torch.where(indices_TK == expert)
        result = _network(self, expert, hidden_TD[tokens])
        output_TD = output_TD.index_add(
            0, tokens, (result * weights_TK[tokens, choice, None]).to(output_TD.dtype)
        )
    return output_TD


def automatic(
    self: SwiGLUExperts | MLPExperts, hidden_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Grouped matrix products where torch has them, the loop elsewhere (float64, sizes that are not aligned,
    other width at the output).

    Autocast does not know grouped products, which would then run in the weights' float32. So its dtype is
    taken here, for input, weights and output, as it is for a linear layer.
    """
    dtype = _autocast_dtype(hidden_TD.device) or self.down_proj.dtype
    if not (_groups(self, dtype) and len(hidden_TD) and self.down_proj.shape[1] == hidden_TD.shape[1]):
        return loop(self, hidden_TD, indices_TK, weights_TK)
    experts: Any = self if dtype == self.down_proj.dtype else _Cast(self, dtype)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_TD.to(dtype), indices_TK, weights_TK.to(dtype))


class _Cast:
    """Experts seen through another dtype; gradients reach the tensors themselves."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts, self._dtype = experts, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(self._dtype) if isinstance(value, Tensor) else value


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _groups(experts: SwiGLUExperts | MLPExperts, dtype: torch.dtype) -> bool:
    aligned = all(n * dtype.itemsize % _GROUP_ALIGNMENT == 0 for n in experts.down_proj.shape[1:])
    return aligned and dtype != torch.float64


ALL_EXPERTS_FUNCTIONS.register(AUTOMATIC, automatic)
