"""Token retention maps: the image tokens that a sparsified model retains at every rate, for some questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from mmpipe.analysis.efficiency import ways
from mmpipe.inference.generate import Answerer
from mmpipe.inference.question import Question
from mmpipe.models.sparsity.hooks import prompt_retention
from mmpipe.models.sparsity.record import recording

RetentionMap = dict[str, Any]


@torch.inference_mode()
def retention_maps(answerer: Answerer, questions: Sequence[Question], rates: Sequence[float]) -> list[RetentionMap]:
    """Of every image of ``questions``: ``question_id, prompt, image`` (its number) and, by rate, ``kept``, the tokens
    in order as a string of 0 and 1. Rates of 1, which retain all, are left out."""
    found = []
    for question in questions:
        inputs = answerer.inputs([question])
        retained: dict[float, list[list[bool]]] = {}
        for rate, way in ways(answerer.model, rates).items():
            if rate is None or rate == 1:
                continue
            with way(), recording(answerer.model) as record:
                answerer.model(**inputs, use_cache=False, logits_to_keep=1, **prompt_retention(answerer.model))
            retained[rate] = record.passes[0].images
        found += [
            {
                "question_id": question.id,
                "prompt": question.recorded_prompt,
                "image": number,
                "kept": {f"{rate:g}": "".join("01"[keep] for keep in maps[number]) for rate, maps in retained.items()},
            }
            for number in range(len(question.images))
        ]
    return found


def seen(answerer: Answerer, question: Question) -> list[Image.Image]:
    """The preprocessed images of a question: resized, cropped or padded."""
    processor = answerer.processor.image_processor
    pixels = answerer.inputs([question])["pixel_values"].float().cpu()
    if processor.do_normalize:
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))
        pixels = pixels * std + mean
    bytes_PHWC = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(image.numpy()) for image in bytes_PHWC]


def grid(tokens: int) -> tuple[int, int] | None:
    """Number of tokens before the patches of a square image (a class token or none), and its patches per side.

    None where the tokens do not form a square.

    >>> grid(576), grid(577), grid(70)
    ((0, 24), (1, 24), None)
    """
    for lead in (0, 1):
        side = math.isqrt(tokens - lead)
        if side * side == tokens - lead:
            return lead, side
    return None
