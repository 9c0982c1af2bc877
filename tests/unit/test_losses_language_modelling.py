"""Chunked cross entropy equals the plain one, in value and gradient, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmpipe.losses import positions
from mmpipe.losses.head import row_log_probabilities, sum_over_rows
from mmpipe.losses.language_modelling import language_modelling_loss


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_BLD = torch.randn(2, 7, 5, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(11, 5, generator=generator).to(dtype).requires_grad_()
    labels_BL = torch.tensor([[-100, -100, 3, 4, 10, -100, 0], [-100, 7, 7, -100, -100, -100, -100]])
    return hidden_BLD, weight_VD, labels_BL


def plain(hidden_BLD: torch.Tensor, weight_VD: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    logits = (hidden_BLD @ weight_VD.T).float()[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels_BL[:, 1:].flatten())


@pytest.mark.parametrize("chunk_bytes", [1, 3 * 4 * 11, 10**6])
def test_value_and_gradients_are_those_of_plain_cross_entropy(chunk_bytes: int) -> None:
    hidden, weight, labels = inputs()
    loss = language_modelling_loss(hidden, weight, labels, chunk_bytes=chunk_bytes)
    expected = plain(hidden, weight, labels)
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss, (hidden, weight))
    for ours, theirs in zip(got, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_first_token_is_never_predicted_and_last_row_never_read() -> None:
    rows, targets = positions.response(torch.tensor([[5, -100, 6], [-100, -100, -100]]))
    assert rows.tolist() == [1]
    assert targets.tolist() == [6]


def test_micro_batches_with_a_shared_normaliser_add_up() -> None:
    hidden, weight, labels = inputs()
    count = (labels[:, 1:] != -100).sum()
    parts = [language_modelling_loss(hidden[i : i + 1], weight, labels[i : i + 1], denominator=count) for i in range(2)]
    torch.testing.assert_close(sum(parts), plain(hidden, weight, labels))


def test_nothing_supervised_is_zero_with_gradients() -> None:
    hidden, weight, labels = inputs()
    loss = language_modelling_loss(hidden, weight, torch.full_like(labels, -100))
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_half_precision_keeps_its_dtype_and_autocast_computes_in_its_own() -> None:
    hidden, weight, labels = inputs(torch.bfloat16)
    loss = language_modelling_loss(hidden, weight, labels)
    assert loss.dtype == torch.float32
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16

    hidden, weight, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        cast = language_modelling_loss(hidden, weight, labels)
    cast.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    exact = language_modelling_loss(*inputs())
    assert 0 < abs(cast.item() - exact.item()) < 0.05


def test_a_frozen_head_gets_no_gradient_and_no_grad_mode_works() -> None:
    hidden, weight, labels = inputs()
    language_modelling_loss(hidden, weight.detach(), labels).backward()
    assert weight.grad is None
    with torch.no_grad():
        assert not language_modelling_loss(hidden, weight, labels).requires_grad


def test_second_backward_is_refused() -> None:
    loss = language_modelling_loss(*inputs())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


def test_measurements_are_summed_over_rows() -> None:
    hidden_RD, weight_VD = torch.randn(5, 3), torch.randn(4, 3)

    def values(logits_CV, rows):
        return logits_CV.sum(1), {"largest": logits_CV.amax(1)}

    total, measured = sum_over_rows(hidden_RD, weight_VD, values, chunk_bytes=1)
    logits = hidden_RD @ weight_VD.T
    torch.testing.assert_close(total, logits.sum())
    torch.testing.assert_close(measured["largest"], logits.amax(1).sum())


@pytest.mark.parametrize("chunk_bytes", [1, 10**6])
def test_row_log_probabilities(chunk_bytes: int) -> None:
    hidden, weight, labels = inputs()
    rows, targets = positions.response(labels)
    weights_R = torch.linspace(-1, 2, len(rows))
    ours = row_log_probabilities(hidden.flatten(0, 1)[rows], weight, targets, chunk_bytes=chunk_bytes)
    plain_R = (hidden @ weight.T).log_softmax(-1).flatten(0, 1)[rows].gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(ours, plain_R)
    got = torch.autograd.grad((ours * weights_R).sum(), (hidden, weight))
    expected = torch.autograd.grad((plain_R * weights_R).sum(), (hidden, weight))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_in_double_precision_by_finite_differences() -> None:
    hidden, weight, labels = inputs(torch.float64)
    rows, targets = positions.response(labels)

    def squared(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return row_log_probabilities(h.flatten(0, 1)[rows], w, targets, chunk_bytes=1).square().sum()

    assert torch.autograd.gradcheck(squared, (hidden, weight))
