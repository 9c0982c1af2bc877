"""Segments of a batch: image tokens, the last answer, and the question before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmpipe.data.labels import IGNORE
from mmpipe.errors import DataError


@dataclass(frozen=True)
class Segments:
    """Masks ``[B, L]`` over the tokens of a batch; they do not overlap."""

    images_BL: Tensor
    """All tokens of all images."""
    answers_BL: Tensor
    """The last answer of each row; earlier answers of a conversation stay whole."""
    questions_BL: Tensor
    """The tokens between the last answer and the image or answer before it; none in rows without images."""


def of_batch(input_ids_BL: Tensor, labels_BL: Tensor, attention_mask_BL: Tensor, image_token: int) -> Segments:
    """The segments of a training batch, from its labels: for any template and number of images."""
    real_BL = attention_mask_BL.bool()
    images_BL = (input_ids_BL == image_token) & real_BL
    supervised_BL = (labels_BL != IGNORE) & real_BL
    answers_BL = _last_run(supervised_BL)
    places_L = torch.arange(labels_BL.shape[1], device=labels_BL.device)
    before_BL = answers_BL.any(1, keepdim=True) & (answers_BL.cumsum(1) == 0)
    # the question begins after the last image or answer
    seen_BL = before_BL & (images_BL | supervised_BL)
    begin_B1 = torch.where(seen_BL, places_L + 1, 0).amax(1, keepdim=True)
    with_images_B1 = (images_BL & before_BL).any(1, keepdim=True)
    questions_BL = before_BL & real_BL & (places_L >= begin_B1) & with_images_B1
    return Segments(images_BL, answers_BL, questions_BL)


def _last_run(mask_BL: Tensor) -> Tensor:
    """The last unbroken run of each row of ``mask_BL``."""
    gaps_BL = (~mask_BL).cumsum(1)
    at_end_B1 = torch.where(mask_BL, gaps_BL, -1).amax(1, keepdim=True)
    return mask_BL & (gaps_BL == at_end_B1)


def one_by_one(hidden_BLD: Tensor, images_BL: Tensor, image_tokens: int) -> Tensor:
    """The hidden states of all images, ``[images, image_tokens, D]``, in the order of rows and positions.

    Raises DataError when a row's image tokens are not whole images.
    """
    counts_B = images_BL.sum(1)
    if bool((counts_B % image_tokens).any()):
        raise DataError(
            f"rows with {sorted(set(counts_B.tolist()))} image tokens do not hold whole images of {image_tokens} "
            "tokens; the predictors were trained for a tower that gives an image so many"
        )
    return hidden_BLD[images_BL].view(-1, image_tokens, hidden_BLD.shape[-1])
