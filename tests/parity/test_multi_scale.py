"""Features at several scales against LibMoE's published code; its tower is replaced by an average pooling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, Phi3Config, SiglipVisionConfig

from mmpipe.models.llava import joined_config
from mmpipe.models.moe.modeling_mmpipe_llava import SparseLlava, SparseLlavaConfig
from mmpipe.models.moe.spec import MoESettings
from mmpipe.models.vision_tower import multi_scale_features

VECTORS = Path(__file__).parents[1] / "fixtures" / "vectors" / "libmoe"


def test_features_at_scales_1_and_3() -> None:
    vector = json.loads((VECTORS / "s2_multiscale.json").read_text())

    def encode(pixels: Tensor) -> Tensor:
        return F.avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)

    features = multi_scale_features(torch.tensor(vector["inputs"]["images"]), (1, 3), encode)
    torch.testing.assert_close(features, torch.tensor(vector["expected"]["features"]), atol=1e-6, rtol=1e-5)


SIGLIP = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
)
CLIP = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
IDLE = {"siglip": (15.2, 45.0), "clip": (12.6, 37.8)}
"""Millions of parameters of the last block, dense and with four experts, which is not built here."""


@pytest.mark.parametrize(
    ("tower", "select", "tokens", "dense", "sparse"),
    [(SIGLIP, "full", 256, 4250, 5103), (CLIP, "patch", 576, 4140, 4792)],
    ids=["siglip", "clip"],
)
def test_sizes_of_the_published_models(
    tower: SiglipVisionConfig | CLIPVisionConfig, select: str, tokens: int, dense: int, sparse: int
) -> None:
    settings = MoESettings(experts=4, top_k=2, placement="dense").model_dump(mode="json")
    idle = IDLE["siglip" if select == "full" else "clip"]
    experts = {"vision_tower": settings, "multi_modal_projector": settings}
    for moe, published, left_out in (({}, dense, idle[0]), (experts, sparse, idle[1])):
        joined = joined_config(tower, Phi3Config(), image_id=32011, feature_layer=-2, feature_select=select)  # type: ignore[arg-type]
        assert joined.image_seq_length == tokens
        config = SparseLlavaConfig.from_dict(joined.to_dict())
        config.mmpipe = {"tower": {"scales": [1, 3]}, "moe": moe}
        with torch.device("meta"):
            model = SparseLlava(config)
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        assert millions == pytest.approx(published - left_out, abs=1)
