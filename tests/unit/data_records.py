"""A tiny data set, tokenizer and image processor for the tests of the data layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlavaImageProcessorPil, PreTrainedTokenizerFast

from mmpipe.data.mixture import build_mixture
from mmpipe.data.spec import MixtureSpec
from mmpipe.data.templates import get_template
from mmpipe.data.tokens import TextEncoder, TokenTable, tokenise

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|end|>", "<image>"]
IMAGE_TOKENS = 4
SIDE = 28

Entry = dict[str, Any]


@cache
def char_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a character, the specials whole."""
    characters = [chr(code) for code in [10, *range(32, 127)]]
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIALS)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )


def processor(aspect: str = "pad") -> LlavaImageProcessorPil:
    return LlavaImageProcessorPil(
        do_pad=aspect == "pad", size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )


def encoder(template: str = "vicuna_v1", max_length: int | None = None, **changes: Any) -> TextEncoder:
    parts = {
        "template": get_template(template),
        "tokenizer": char_tokenizer(),
        "image_token": "<image>",
        "tokens_per_image": IMAGE_TOKENS,
        "max_length": max_length,
    }
    return TextEncoder(**(parts | changes))


def in_tokens(records: Path, with_encoder: TextEncoder | None = None, max_bad: float = 1.0) -> TokenTable:
    """The records of a file in tokens, beside it."""
    out = records.parent / "tokens"
    tokenise(records, with_encoder or encoder(), out, max_bad=max_bad)
    return TokenTable(out)


def entry(number: int, image: str | list[str] | None = None, **changes: Any) -> Entry:
    """A good record in LLaVA's format; with an image unless told otherwise."""
    marks = len(image) if isinstance(image, list) else bool(image)
    made: Entry = {
        "id": f"r{number}",
        "conversations": [
            {"from": "human", "value": "<image>" * marks + "\n" * bool(marks) + f"What is {number}?"},
            {"from": "gpt", "value": f"It is {number}."},
        ],
    }
    if image:
        made["image"] = image
    return made | changes


def said(*texts: str) -> list[dict[str, str]]:
    """A conversation that begins with the user."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def image(path: Path, size: tuple[int, int] = (30, 20), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = bytes((seed + 7 * i) % 256 for i in range(size[0] * size[1] * 3))
    Image.frombytes("RGB", size, pixels).save(path)
    return path


def data_set(path: Path, entries: Sequence[Entry], images: int = 4) -> Path:
    """A data set directory: ``data.json`` and ``img/0.png``, ``img/1.png``, ..."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "data.json").write_text(json.dumps(entries))
    for number in range(images):
        image(path / "img" / f"{number}.png", seed=number)
    return path


def mix(
    data: Path,
    out: Path,
    *,
    workers: int = 1,
    log: Callable[[str], None] = print,
    max_bad: float = 0.01,
    published: Path | None = None,
    **part: Any,
) -> dict[str, Any]:
    """A mixture of one part; returns the report."""
    settings = {"dataset": "made", "annotations": "data.json", "images": "img"} | part
    spec = MixtureSpec.model_validate({"parts": [settings], "max_bad": max_bad})
    return build_mixture(spec, {"made": data}, out, workers=workers, log=log, published=published)
