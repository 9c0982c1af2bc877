"""Pixels against those of the CLIP processor that LLaVA uses, with and without padding to a square."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image
from reference_tokenizers import vectors
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmpipe.data.images import image_processor

REFERENCE = vectors("llava/clip_preprocess.json")


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = REFERENCE["processor"]["crop"]
    path = tmp_path_factory.mktemp("tower")
    CLIPImageProcessorPil(
        size={"shortest_edge": REFERENCE["processor"]["shortest_edge"]}, crop_size={"height": size, "width": size}
    ).save_pretrained(path)
    return path


def made(size: str) -> Image.Image:
    width, height = map(int, size.split("x"))
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = [(7 * x + 3 * y) % 256, (x * x + y) % 256, (x + 2 * y * y) % 256]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("size", REFERENCE["out"])
def test_pixels_are_bit_equal(tower: Path, size: str, aspect: Literal["square", "pad"]) -> None:
    expected: dict[str, Any] = REFERENCE["out"][size][aspect]
    processor = image_processor(tower, aspect)
    pixels = processor(made(size), return_tensors="np")["pixel_values"][0]
    assert list(pixels.shape) == expected["shape"]
    assert pixels.shape[1:] == (processor.crop_size["height"], processor.crop_size["width"])
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels[:, 0, :4], np.float32(expected["corner"]))
    if "centre" in expected:
        np.testing.assert_array_equal(pixels[:, 12, 10:14], np.float32(expected["centre"]))
    assert pixels.mean(dtype=np.float64) == pytest.approx(expected["mean"], abs=1e-7)
