"""Preference losses: the chosen answer becomes more likely than the rejected one, relative to a reference model.

With log pi(y) the sum of the log-probabilities of an answer's tokens, r = log pi_policy(y) - log pi_reference(y), and beta
how fast preference saturates:

* ``sigmoid``   -(1 - s) log sigma(beta (r_c - r_r)) - s log sigma(-beta (r_c - r_r)), label smoothing s (DPO, cDPO);
* ``hinge``     max(0, 1 - beta (r_c - r_r)) (SLiC);
* ``ipo``       (r_c - r_r - 1 / (2 beta))^2;
* ``kto_pair``  1 - sigma(beta (r_c - KL_r)) and 1 - sigma(beta (KL_c - r_r)), two losses a pair, where KL_c and KL_r are
  the batch means of r_c and r_r, not below zero.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpipe.errors import ConfigError
from mmpipe.losses import positions
from mmpipe.losses.head import CHUNK_BYTES, row_log_probabilities

LossName = Literal["kto_pair", "sigmoid", "hinge", "ipo"]


def response_log_probabilities(
    hidden_BLD: Tensor, weight_VD: Tensor, labels_BL: Tensor, *, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """Sum of the log-probabilities of each sequence's supervised tokens, ``[B]``, and their number, ``[B]``."""
    rows_R, targets_R = positions.response(labels_BL)
    log_R = row_log_probabilities(hidden_BLD.flatten(0, 1)[rows_R], weight_VD, targets_R, chunk_bytes=chunk_bytes)
    sequence_R = rows_R // labels_BL.shape[1]
    sums_B = log_R.new_zeros(len(labels_BL)).index_add(0, sequence_R, log_R)
    return sums_B, (labels_BL[:, 1:] != positions.IGNORED).sum(1)


def preference_loss(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    loss_type: LossName = "kto_pair",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    compat: Literal["fixed", "reference"] = "fixed",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of a batch of pairs, ``[B]`` (``kto_pair``: ``[2B]``, chosen before rejected), and metrics.

    Arguments are sums of log-probabilities. Gradients flow through the policy's. ``kto_pair``'s batch means are those of the
    given pairs (a micro batch), and constants; the reference implementation (LLaVA-MoD) differentiates them as well.

    Metrics, means over the pairs: ``rewards_chosen`` and ``rewards_rejected`` (beta r), their difference
    ``rewards_margin``, and ``rewards_accuracy``, the share of pairs with r_c > r_r.

    Raises ConfigError for a beta that is not positive, or smoothing outside [0, 0.5) or with a loss that has none.
    """
    if beta <= 0:
        raise ConfigError(f"beta must be positive, not {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(f"label_smoothing must be in [0, 0.5), not {label_smoothing}")
    if label_smoothing and loss_type != "sigmoid":
        raise ConfigError(f"label_smoothing belongs to the loss 'sigmoid', not to '{loss_type}'")
    chosen_B = policy_chosen_B - reference_chosen_B.detach()
    rejected_B = policy_rejected_B - reference_rejected_B.detach()
    losses = _losses(chosen_B, rejected_B, loss_type, beta, label_smoothing, detach_kl=compat == "fixed")
    with torch.no_grad():
        chosen_B, rejected_B = beta * chosen_B, beta * rejected_B
        metrics = {
            "rewards_chosen": chosen_B.mean(),
            "rewards_rejected": rejected_B.mean(),
            "rewards_margin": (chosen_B - rejected_B).mean(),
            "rewards_accuracy": (chosen_B > rejected_B).to(chosen_B.dtype).mean(),
        }
    return losses, metrics


def _losses(
    chosen_B: Tensor, rejected_B: Tensor, loss_type: LossName, beta: float, smoothing: float, detach_kl: bool
) -> Tensor:
    """The losses of the log-ratios r of chosen and rejected answers."""
    margin_B = chosen_B - rejected_B
    match loss_type:
        case "sigmoid":
            logits_B = beta * margin_B
            return -(1 - smoothing) * F.logsigmoid(logits_B) - smoothing * F.logsigmoid(-logits_B)
        case "hinge":
            return torch.relu(1 - beta * margin_B)
        case "ipo":
            return (margin_B - 1 / (2 * beta)) ** 2
        case "kto_pair":
            kl_chosen, kl_rejected = chosen_B.mean(), rejected_B.mean()
            if detach_kl:
                kl_chosen, kl_rejected = kl_chosen.detach(), kl_rejected.detach()
            gain_chosen_B = chosen_B - kl_rejected.clamp_min(0)
            gain_rejected_B = kl_chosen.clamp_min(0) - rejected_B
            return 1 - torch.sigmoid(beta * torch.cat([gain_chosen_B, gain_rejected_B]))
