"""Features at several scales against LibMoE's published code; its tower is replaced by an average pooling."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpipe.models.tower import multi_scale_features

VECTORS = Path(__file__).parents[1] / "fixtures" / "vectors" / "libmoe"


def test_features_at_scales_1_and_3() -> None:
    vector = json.loads((VECTORS / "s2_multiscale.json").read_text())

    def encode(pixels: Tensor) -> Tensor:
        return F.avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)

    features = multi_scale_features(torch.tensor(vector["inputs"]["images"]), (1, 3), encode)
    torch.testing.assert_close(features, torch.tensor(vector["expected"]["features"]), atol=1e-6, rtol=1e-5)
