"""HTML below an answer: the expert loads, and the image tokens a sparsified model retained."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mmpipe.chat.images import EncodedImage
from mmpipe.data.images import data_url

if TYPE_CHECKING:
    from mmpipe.chat.messages import Completion, Message
    from mmpipe.chat.model import ChatModel

_SIDE = 336
"""Width of a shown image in pixels."""
_HEADING = "<p style='margin:0 0 6px;font-size:13px'>"


def visualise(model: ChatModel, done: Completion, history: Sequence[Message]) -> str:
    """HTML of a model's last answer; empty for a dense model that retains all of an image."""
    images = [image for message in history for image in message.images]
    retained = [
        retained_image(model, image.decode() if isinstance(image, EncodedImage) else image, kept)
        for image, kept in zip(images, done.retention_maps, strict=False)
    ]
    return _expert_bars(done.expert_loads) + _side_by_side(retained)


def _expert_bars(loads: Mapping[str, Sequence[float]]) -> str:
    """One row per layer, with a bar per expert as high as its share of the load; empty without experts."""
    if not loads:
        return ""
    rows = "".join(_row(layer, shares) for layer, shares in loads.items())
    return (
        f"<div class='experts'>{_HEADING}Share of the work each expert did in this answer "
        f"(prompt included)</p><table style='border-collapse:collapse;font-size:12px'>{rows}</table></div>"
    )


def _row(layer: str, shares: Sequence[float]) -> str:
    highest = max(*shares, 1e-9)
    bars = "".join(
        f"<td style='padding:2px 5px;vertical-align:bottom;text-align:center' title='expert {number}: {share:.1%}'>"
        f"<div style='width:30px;height:{round(32 * share / highest)}px;background:#0072b2;margin:auto'></div>"
        f"{share:.0%}</td>"
        for number, share in enumerate(shares)
    )
    return f"<tr><th style='text-align:left;padding-right:10px;font-weight:500'>{html.escape(layer)}</th>{bars}</tr>"


def retained_image(model: ChatModel, image: Image.Image, kept: Sequence[bool]) -> Image.Image:
    """The preprocessed image, faded where its tokens were dropped; ``kept`` is (tokens,), row by row."""
    processor = model.processor.image_processor
    pixels = np.asarray(processor(images=[image], return_tensors="np")["pixel_values"][0])  # (3, height, width)
    mean, std = (np.asarray(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    seen = ((pixels * std + mean).clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    side = math.isqrt(len(kept))
    light = np.where(np.asarray(kept[: side * side]).reshape(side, side), 255, 45).astype(np.uint8)
    shown = Image.fromarray(seen).resize((_SIDE, _SIDE))
    mask = Image.fromarray(light).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    return Image.composite(shown, Image.new("RGB", shown.size, "white"), mask)


def _side_by_side(images: Sequence[Image.Image]) -> str:
    if not images:
        return ""
    shown = "".join(
        f"<img alt='' src='{data_url(image)}' style='width:200px;border:1px solid #ccc'>" for image in images
    )
    return (
        f"<div class='kept'>{_HEADING}Parts of the images that the model retained</p>"
        f"<div style='display:flex;flex-wrap:wrap;gap:8px'>{shown}</div></div>"
    )
