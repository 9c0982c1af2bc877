"""Floating-point operations of training.

A matrix of N elements costs 2N operations a token forward, 2N for the gradient of its input and 2N for its own: 6N, of
which a frozen matrix under a trained one saves the last third, and one below everything that trains all but the first
(Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Causal attention adds ``2 * width * L`` a token, layer and
direction (Chowdhery et al. 2022, arXiv 2204.02311, appendix B, halved for the mask).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleWork:
    """Sizes that decide the operations of one sample."""

    length: float
    """Tokens of the language model, images included."""
    supervised: float
    """Positions that the output head computes."""
    layers: float
    """Elements of the decoder's matrices that a token uses (of experts, the chosen ones)."""
    trained_layers: float
    """The trainable ones of them."""
    head: float
    """Elements of the output head."""
    attention_width: float
    """Layers times the width of all queries."""
    tower: float = 0
    """Elements of the vision tower."""
    tower_trains: bool = False
    tower_tokens: float = 0
    head_trains: bool = True


def forward(work: SampleWork) -> float:
    """Operations of the language model's forward pass for one sample."""
    matrices = 2 * work.layers * work.length
    attention = 2 * work.attention_width * work.length**2
    return matrices + attention + 2 * work.head * work.supervised


def training(work: SampleWork, checkpointing: bool = False) -> float:
    """Operations of one sample's training step: forward, backward, and the forward pass repeated by checkpointing."""
    once = forward(work)
    # the scores' gradient needs both factors
    attention = 2 * work.attention_width * work.length**2
    weights = 2 * work.trained_layers * work.length + (2 * work.head * work.supervised if work.head_trains else 0)
    tower = 2 * work.tower * work.tower_tokens * (3 if work.tower_trains else 1)
    again = once - 2 * work.head * work.supervised if checkpointing else 0
    return once + (once + attention) + weights + tower + again


def gpu_hours(operations: float, tflops: float, utilization: float) -> float:
    """Hours of one GPU with ``tflops`` at its peak, of which ``utilization`` is reached (model FLOPs utilization)."""
    return operations / (tflops * 1e12 * utilization) / 3600
