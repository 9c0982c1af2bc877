"""What trains in each stage, against the table of LLaVA-MoD's published code.

Its names are DeepSpeed's, with one module an expert; here the experts of a layer are two fused tensors.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from mmpipe.models.moe.spec import MoESettings
from mmpipe.models.moe.upcycle import upcycle
from mmpipe.models.trainable import select

TABLE = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "vectors" / "llava_mod" / "09_moe_layers_and_trainable.json").read_text()
)["expected"]["requires_grad"]
SPARSE = ["language_model.layers.*.mlp.*", "multi_modal_projector.*"]
DENSE = ["language_model.*", "lm_head.*", "multi_modal_projector.*"]
NAMES = (
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.", "language_model."),
    (r"\.deepspeed_moe\.gate\.wg\.weight$", ".router.weight"),
    (r"\.deepspeed_moe\.experts\.deepspeed_experts\.\d+\.(gate|up)_proj\.weight$", ".experts.gate_up_proj"),
    (r"\.deepspeed_moe\.experts\.deepspeed_experts\.\d+\.down_proj\.weight$", ".experts.down_proj"),
)


def ours(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def model(sparse: bool) -> LlavaForConditionalGeneration:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    text = Qwen2Config(**sizes, vocab_size=32, num_key_value_heads=2, tie_word_embeddings=True)
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    dense = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=1, tie_word_embeddings=True)
    )
    return upcycle(dense, MoESettings(placement="sparse")) if sparse else dense


@pytest.mark.parametrize(
    ("stage", "patterns"),
    [
        ("dense2sparse.sh", SPARSE),
        ("preference.sh", SPARSE),
        ("dense2dense.sh (train_modules ignored: everything but the vision tower trains)", DENSE),
    ],
)
def test_the_same_parameters_train(stage: str, patterns: list[str]) -> None:
    made = model(sparse=patterns is SPARSE)
    trains = set(select(made, patterns))
    expected: dict[str, set[bool]] = {}
    for name, flag in TABLE[stage].items():
        expected.setdefault(ours(name), set()).add(flag)
    assert {name for name, flags in expected.items() if flags == {True}} == trains - {"lm_head.weight"}
    known = {name.removeprefix("model.") for name, _ in made.named_parameters()}
    assert set(expected) == {name for name in known if not name.startswith("vision_tower")}
