"""Preference losses: what flows, what is constant, and log-probabilities of answers."""

from __future__ import annotations

import pytest
import torch

from mmpipe.errors import ConfigError
from mmpipe.losses.preference import preference_loss, response_log_probabilities


def rows() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(3, generator=torch.Generator().manual_seed(i)) * 4 for i in range(4))


@pytest.mark.parametrize("chunk_bytes", [1, 10**6])
def test_log_probabilities_of_answers(chunk_bytes: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    labels = torch.tensor([[-100, 2, 3, -100, 6], [1, -100, -100, -100, -100], [-100, -100, -100, 0, -100]])
    sums, counts = response_log_probabilities(hidden, weight, labels, chunk_bytes=chunk_bytes)
    log = (hidden @ weight.T).log_softmax(-1)
    expected = torch.stack([log[0, 0, 2] + log[0, 1, 3] + log[0, 3, 6], hidden.sum() * 0, log[2, 2, 0]])
    torch.testing.assert_close(sums, expected)
    assert counts.tolist() == [3, 0, 1]
    weights = torch.tensor([1.0, 2.0, -3.0])
    for ours, theirs in zip(
        torch.autograd.grad((sums * weights).sum(), (hidden, weight)),
        torch.autograd.grad((expected * weights).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_fixed_kto_treats_its_batch_means_as_constants() -> None:
    chosen, rejected, *reference = rows()
    chosen = (reference[0] + torch.tensor([1.0, 2.0, -1.0])).requires_grad_()
    fixed, _ = preference_loss(chosen, rejected, *reference)
    published, _ = preference_loss(chosen, rejected, *reference, compat="reference")
    torch.testing.assert_close(fixed, published)
    (grad,) = torch.autograd.grad(fixed[3:].sum(), chosen)
    assert not grad.any(), "the losses of rejected answers must not pull on the chosen ones"
    (grad,) = torch.autograd.grad(published[3:].sum(), chosen)
    assert grad.all()


def test_kto_means_are_of_the_pairs_given() -> None:
    chosen, rejected, *reference = rows()
    whole, _ = preference_loss(chosen, rejected, *reference)
    cut = [preference_loss(*(x[i : i + 1] for x in (chosen, rejected, *reference)))[0] for i in range(3)]
    assert not torch.allclose(torch.stack(cut, 1).flatten(), whole)
    margin = preference_loss(chosen, rejected, *reference, loss_type="sigmoid")[0]
    cut = [
        preference_loss(*(x[i : i + 1] for x in (chosen, rejected, *reference)), loss_type="sigmoid")[0]
        for i in range(3)
    ]
    torch.testing.assert_close(torch.cat(cut), margin)


def test_no_gradient_reaches_the_reference_model() -> None:
    chosen, rejected, *reference = rows()
    for tensor in (chosen, *reference):
        tensor.requires_grad_()
    for loss_type in ("kto_pair", "sigmoid", "hinge", "ipo"):
        losses, _ = preference_loss(chosen, rejected, *reference, loss_type=loss_type)
        grads = torch.autograd.grad(losses.sum(), (chosen, *reference), allow_unused=True)
        assert grads[0] is not None
        assert grads[1] is grads[2] is None


@pytest.mark.parametrize("loss_type", ["kto_pair", "sigmoid", "hinge"])
def test_a_larger_margin_is_a_smaller_loss(loss_type: str) -> None:
    zero = torch.zeros(2)
    losses = [
        preference_loss(zero + gain, zero - gain, zero, zero, loss_type=loss_type)[0].mean().item()
        for gain in (-2.0, 0.0, 2.0)
    ]
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"loss_type": "sigmoid", "label_smoothing": 0.5}, "label_smoothing must be in"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "belongs to the loss 'sigmoid'"),
    ],
)
def test_settings_that_cannot_be_meant(given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preference_loss(*rows(), **given)
