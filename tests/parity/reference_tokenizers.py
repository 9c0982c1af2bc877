"""The tokenizers that the reference vectors were made with, on the fast backend."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VECTORS = Path(__file__).parents[1] / "fixtures/vectors"
CHAR_SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def vectors(name: str) -> Any:
    return json.loads((VECTORS / name).read_text())


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """By the name that the vectors give it; the image token is added as for a real model."""
    if name.startswith("sp_"):
        description = vectors("llava/tiny_llama_tokenizer.json")
        if name == "sp_nonlegacy":
            description["normalizer"] = None
            description["pre_tokenizer"] = {
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": "first",
                "split": False,
            }
        backend = Tokenizer.from_str(json.dumps(description))
    else:
        backend = _characters(bos=name.startswith("char_bos"))
    bos = None if name == "char_nobos" else "<s>"
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="</s>", unk_token="<unk>")
    made.add_tokens(["<image>"], special_tokens=True)
    return made


def _characters(*, bos: bool) -> Tokenizer:
    """id = 100 + code point; the specials come first."""
    vocabulary = {token: number for number, token in enumerate(CHAR_SPECIALS)}
    vocabulary |= {chr(code): 100 + code for code in range(10, 127)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(CHAR_SPECIALS)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def toy_qwen(pieces: list[str], regex: str) -> PreTrainedTokenizerFast:
    """The toy tokenizer of the LLaVA-MoD vectors: pieces by regular expression, without BOS."""
    known = dict.fromkeys(piece for piece in ["<|extra_0|>", *pieces] if piece != "<image>")
    vocabulary = {piece: number for number, piece in enumerate(known)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|extra_0|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(regex), "isolated")
    backend.add_special_tokens(["<|endoftext|>", "<|extra_0|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="<|extra_0|>")
    made.add_tokens(["<image>"], special_tokens=True)
    return made


def numbers(count: int) -> PreTrainedTokenizerFast:
    """The word ``tN`` is the token N."""
    vocabulary = {f"t{number}": number for number in range(count)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="t0", pad_token="t0")
    made.add_tokens(["<image>"], special_tokens=True)
    return made
