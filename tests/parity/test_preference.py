"""Preference losses against LLaVA-MoD's published code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmpipe.losses.preference import preference_loss

CASE = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "vectors" / "llava_mod" / "05_preference_losses.json").read_text()
)
SETTINGS = [(batch, setting) for batch, settings in CASE["expected"].items() for setting in settings]


def options(setting: str) -> dict:
    name, *pairs = setting.split("|")
    given = dict(pair.split("=") for pair in pairs)
    return {"loss_type": name, "beta": float(given["beta"]), "label_smoothing": float(given.get("ls", 0))}


@pytest.mark.parametrize(("batch", "setting"), SETTINGS)
def test_losses_rewards_and_gradients(batch: str, setting: str) -> None:
    inputs = {name: torch.tensor(values) for name, values in CASE["inputs"][batch].items()}
    expected = CASE["expected"][batch][setting]
    chosen, rejected = inputs["policy_chosen"].requires_grad_(), inputs["policy_rejected"].requires_grad_()
    losses, metrics = preference_loss(
        chosen, rejected, inputs["ref_chosen"], inputs["ref_rejected"], compat="reference", **options(setting)
    )
    torch.testing.assert_close(losses, torch.tensor(expected["losses"]), atol=1e-6, rtol=1e-6)
    losses.mean().backward()
    for parameter, key in ((chosen, "grad_policy_chosen"), (rejected, "grad_policy_rejected")):
        torch.testing.assert_close(parameter.grad, torch.tensor(expected[key]), atol=1e-6, rtol=1e-5)
    rewards = [torch.tensor(expected[key]) for key in ("chosen_rewards", "rejected_rewards")]
    torch.testing.assert_close(metrics["rewards_chosen"], rewards[0].mean())
    torch.testing.assert_close(metrics["rewards_rejected"], rewards[1].mean())
    torch.testing.assert_close(metrics["rewards_margin"], (rewards[0] - rewards[1]).mean())
    torch.testing.assert_close(metrics["rewards_accuracy"], (rewards[0] > rewards[1]).float().mean())
