"""Losses on the output head without materialising all logits.

For a vocabulary of 150,000 the logits of 2,000 positions are 1.2 GB in float32, and a plain loss holds several such
tensors. Here the head is applied to a few rows at a time: loss and gradients of those rows are computed, then their logits
are freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpipe.losses import CHUNK_BYTES

RowValues = Callable[[Tensor, slice], tuple[Tensor, dict[str, Tensor]]]
"""``(logits_CV, rows) -> (values_C, measurements)``: float32 logits of some rows to each row's value and to detached
measurements, each ``[C]``."""


def sum_over_rows(
    hidden_RD: Tensor, weight_VD: Tensor, values: RowValues, *, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum ``values`` over the rows of ``hidden_RD @ weight_VD.T``; differentiable in both arguments.

    Returns the sum (a scalar; zero, with zero gradients, when there are no rows) and the sums of the measurements. The
    gradient is computed in the forward pass; a second backward pass through the same result is an error.
    """
    measured: dict[str, Tensor] = {}
    total: Tensor = _SumOverRows.apply(hidden_RD, weight_VD, values, measured, chunk_bytes)
    return total, measured


def row_log_probabilities(
    hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, *, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Log-probability of each row's target, float32 ``[R]``; differentiable in ``hidden_RD`` and ``weight_VD``.

    For losses that are not a sum over rows. The logits are computed again in the backward pass.
    """
    return _RowLogProbabilities.apply(hidden_RD, weight_VD, targets_R, chunk_bytes)


def chunks(rows: int, vocabulary: int, chunk_bytes: int) -> Iterator[slice]:
    """Slices of ``rows``, each with about ``chunk_bytes`` of float32 logits."""
    size = max(1, chunk_bytes // (4 * vocabulary))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


class _SumOverRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, values: RowValues, measured: dict[str, Tensor], chunk_bytes: int
    ) -> Tensor:
        head = _Head(hidden_RD, weight_VD, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        total = torch.zeros((), dtype=head.precision, device=hidden_RD.device)
        for rows in chunks(len(hidden_RD), len(weight_VD), chunk_bytes):
            logits_CV = head.logits(rows)
            with torch.set_grad_enabled(head.trains):
                values_C, measurements = values(logits_CV.requires_grad_(head.trains), rows)
                chunk_sum = values_C.sum()
            total += chunk_sum.detach()
            for name, measured_C in measurements.items():
                measured[name] = measured.get(name, torch.zeros_like(total)) + measured_C.detach().sum()
            if head.trains:
                head.accumulate(rows, *torch.autograd.grad(chunk_sum, logits_CV))
        ctx.grads = head.grad_hidden_RD, head.grad_weight_VD
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.grads is None:
            raise RuntimeError("this loss can be differentiated once; its gradient is not kept")
        grads, ctx.grads = ctx.grads, None
        # scaled in place: the gradient of the weight is as large as the weight
        scaled = (None if g is None else g.mul_(grad.to(g.dtype)) for g in grads)
        return *scaled, None, None, None  # type: ignore[return-value]


class _RowLogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, chunk_bytes: int) -> Tensor:
        head = _Head(hidden_RD, weight_VD, False, False)
        result_R = torch.empty(len(hidden_RD), dtype=head.precision, device=hidden_RD.device)
        for rows in chunks(len(hidden_RD), len(weight_VD), chunk_bytes):
            logits_CV = head.logits(rows)
            target_C = logits_CV.gather(1, targets_R[rows, None]).squeeze(1)
            result_R[rows] = target_C - logits_CV.logsumexp(1)
        ctx.save_for_backward(hidden_RD, weight_VD, targets_R)
        ctx.compute, ctx.chunk_bytes = head.compute, chunk_bytes
        return result_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_RD, weight_VD, targets_R = ctx.saved_tensors
        head = _Head(hidden_RD, weight_VD, ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.compute)
        for rows in chunks(len(hidden_RD), len(weight_VD), ctx.chunk_bytes):
            grad_CV = head.logits(rows).softmax(1).neg_()
            grad_CV.scatter_add_(1, targets_R[rows, None], torch.ones_like(grad_CV[:, :1]))
            head.accumulate(rows, grad_CV.mul_(grad_R[rows, None]))
        return head.grad_hidden_RD, head.grad_weight_VD, None, None


class _Head:
    """A linear head applied in chunks, with its gradients.

    The matrix product runs in the dtype a linear layer would use, the rest in float32 or better.
    """

    def __init__(
        self,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        hidden_trains: bool,
        weight_trains: bool,
        compute: torch.dtype | None = None,
    ) -> None:
        device = weight_VD.device.type
        linear = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        self.compute = compute or linear
        self.precision = torch.promote_types(self.compute, torch.float32)
        self.hidden_RD = hidden_RD.detach().to(self.compute)
        self.weight_VD = weight_VD.detach().to(self.compute)
        self.grad_hidden_RD = torch.empty_like(hidden_RD) if hidden_trains else None
        self.grad_weight_VD = torch.zeros_like(weight_VD) if weight_trains else None
        self.trains = hidden_trains or weight_trains

    def logits(self, rows: slice) -> Tensor:
        with torch.autocast(self.hidden_RD.device.type, enabled=False):
            return (self.hidden_RD[rows] @ self.weight_VD.T).to(self.precision)

    def accumulate(self, rows: slice, grad_CV: Tensor) -> None:
        grad_CV = grad_CV.to(self.compute)
        with torch.autocast(self.hidden_RD.device.type, enabled=False):
            if self.grad_hidden_RD is not None:
                self.grad_hidden_RD[rows] = (grad_CV @ self.weight_VD).to(self.grad_hidden_RD.dtype)
            if self.grad_weight_VD is None:
                return
            if self.grad_weight_VD.dtype == self.compute:
                self.grad_weight_VD.addmm_(grad_CV.T, self.hidden_RD[rows])
            else:
                self.grad_weight_VD += grad_CV.T @ self.hidden_RD[rows]
