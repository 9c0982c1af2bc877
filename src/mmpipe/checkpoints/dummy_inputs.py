"""Deterministic dummy inputs for comparing models of any size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PROMPT_TOKENS = 48


def dummy_inputs(model: Any, rows: int = 2) -> dict[str, Tensor]:
    """Dummy prompts with an image each; ``rows`` of different length, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.vision_config.image_size
    ids = torch.randint(0, model.config.image_token_id, (rows, _PROMPT_TOKENS), generator=generator)
    images = torch.full((rows, model.config.image_seq_length), model.config.image_token_id)
    mask = torch.ones(rows, _PROMPT_TOKENS + images.shape[1], dtype=torch.long)
    for row in range(1, rows):
        mask[row, -(row * _PROMPT_TOKENS // (rows + 1)) :] = 0
    return {
        "input_ids": torch.cat([images, ids], dim=1),
        "attention_mask": mask,
        "pixel_values": torch.randn(rows, 3, size, size, generator=generator),
    }


def dummy_rows(model: Any, rows: int = 8) -> list[dict[str, Tensor]]:
    """Prompts of :func:`dummy_inputs` one by one, without padding."""
    batch = dummy_inputs(model, rows)
    return [
        {
            "input_ids": batch["input_ids"][row : row + 1, mask],
            "attention_mask": batch["attention_mask"][row : row + 1, mask],
            "pixel_values": batch["pixel_values"][row : row + 1],
        }
        for row, mask in enumerate(batch["attention_mask"].bool())
    ]
