"""Router losses at their known points, and that imbalance costs more than balance."""

from __future__ import annotations

import math

import pytest
import torch

from mmpipe.losses.routing import entropy, load_balancing_loss, margin, z_loss


def test_balance_is_one_when_uniform_and_the_number_of_experts_when_collapsed() -> None:
    uniform = torch.full((8, 4), 0.25)
    assert load_balancing_loss(uniform, torch.arange(8) % 4).item() == pytest.approx(1)
    collapsed = torch.tensor([[0.0, 0.0, 1.0, 0.0]]).expand(8, 4)
    assert load_balancing_loss(collapsed, torch.full((8,), 2)).item() == pytest.approx(4)


def test_following_the_gradient_of_the_balance_loss_balances() -> None:
    logits = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0, 0, 0])
    logits.requires_grad_()
    before = torch.bincount(logits.argmax(1), minlength=4).max()
    for _ in range(40):
        p = logits.softmax(1)
        (grad,) = torch.autograd.grad(load_balancing_loss(p, p.argmax(1)), logits)
        logits.data -= 20 * grad
    assert torch.bincount(logits.argmax(1), minlength=4).max() < before


def test_entropy_margin_and_z() -> None:
    assert entropy(torch.full((3, 4), 0.25)).item() == pytest.approx(math.log(4))
    assert entropy(torch.eye(4)).item() == 0
    assert margin(torch.tensor([[0.3, 0.7], [0.5, 0.5]])).item() == pytest.approx(0.2)
    assert margin(torch.ones(3, 1)).item() == 1
    assert z_loss(torch.zeros(5, 4)).item() == pytest.approx(math.log(4) ** 2)


def test_no_token_is_zero_not_nan() -> None:
    empty = torch.zeros(0, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    total = load_balancing_loss(empty, none) + z_loss(empty) + entropy(empty) + margin(empty[:, :2])
    assert total.item() == 0
    total.backward()
