"""Maker of the demo's MOSS2: a tiny language model in the packed layout of ``fnlp/moss2-2_5b-chat``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from mmpipe.artifacts.files import write_json
from mmpipe.demo.backbones import INITIALIZER_RANGE, MAX_POSITIONS, require_whole_heads, texts

if TYPE_CHECKING:
    from transformers import LlamaTokenizer

SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))

# the words of the template that LLaVA-MOSS2 is fine-tuned with
_TEMPLATE = (
    "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual content "
    "that the user provides, and assist the user with a variety of tasks using natural language.\n<</SYS>>\n\n [/INST]"
)


def moss2_tiny(out: Path, *, seed: int = 0, hidden_size: int = 64, layers: int = 3) -> None:
    """Random weights under MOSS2's names, queries, keys and values packed; a Llama tokenizer for the demo's text. There
    is no row to spare for ``<image>``, as in the real model: its vocabulary has to grow."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mmpipe.checkpoints.layouts.moss2 import LAYOUT

    require_whole_heads(hidden_size)
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 16,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000000},
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    out.mkdir(parents=True, exist_ok=True)
    packed = LAYOUT.from_stock(model.state_dict(), config)
    written = {**LAYOUT.written(config), "model_type": "Moss2", "torch_dtype": "float32"}
    save_file(packed, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", written)
    tokenizer.save_pretrained(out)


def _tokenizer() -> LlamaTokenizer:
    """Pieces as of sentencepiece, with byte fallback."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import LlamaTokenizer

    backend = Tokenizer(models.BPE(unk_token=SPECIAL[0], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    # more than the text can fill, so every word becomes one piece
    trainer = BpeTrainer(vocab_size=4096, show_progress=False, special_tokens=[*SPECIAL, *BYTES])
    # a line's end is a byte, as for sentencepiece, and no part of a word
    backend.train_from_iterator((line for text in (_TEMPLATE, *texts()) for line in text.splitlines()), trainer)
    learned = json.loads(backend.to_str())["model"]
    return LlamaTokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        pad_token=SPECIAL[2],
        model_max_length=MAX_POSITIONS,
    )
