"""Tiny LLaVA models and processors in the real formats, made in milliseconds, for the tests of models."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

TEXT = {"qwen2": Qwen2Config, "llama": LlamaConfig, "phi3": Phi3Config}
IMAGE_TOKEN, EOS, PAD = 1, 0, 2


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after the special tokens."""
    special = ["<|endoftext|>", "<image>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    backend.add_special_tokens(special)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=special[EOS],
        pad_token=special[PAD],
        extra_special_tokens={"image_token": special[IMAGE_TOKEN]},
    )


def processor() -> LlavaProcessor:
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(
        image_processor,
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template="{% for message in messages %}{{ message['role'] }}: {% endfor %}",
    )


def llava(
    kind: str = "qwen2", *, tower: str = "clip", tie: bool = False, layers: int = 4, seed: int = 0, **text: object
) -> LlavaForConditionalGeneration:
    """A random model: text family ``kind``, four image tokens an image of 28 x 28 pixels, float32."""
    shape: dict[str, object] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 272,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tie,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "initializer_range": 0.2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    clip = tower == "clip"
    config = LlavaConfig(
        text_config=TEXT[kind](**(shape | text)),
        vision_config=(CLIPVisionConfig if clip else SiglipVisionConfig)(**vision),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
        vision_feature_select_strategy="default" if clip else "full",
        tie_word_embeddings=tie,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config).eval()


def batch(rows: int = 3, length: int = 14, padded: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    """Token ids with one image a row; the last row ends with ``padded`` padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids_BL = torch.randint(3, 250, (rows, length), generator=generator)
    ids_BL[:, 2:6] = IMAGE_TOKEN
    mask_BL = torch.ones_like(ids_BL)
    if padded:
        ids_BL[-1, -padded:] = PAD
        mask_BL[-1, -padded:] = 0
    pixels = torch.randn(rows, 3, 28, 28, generator=generator)
    return {"input_ids": ids_BL, "attention_mask": mask_BL, "pixel_values": pixels}
