"""Mixtures in the tokens of tiny models, as the rule writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmpipe.artifacts import manifest
from mmpipe.checkpoints.load import load_tokenizer
from mmpipe.data.templates import get_template
from mmpipe.data.tokens import TextEncoder, tokenise
from mmpipe.models.llava import IMAGE_TOKEN
from mmpipe.models.settings import VisionLanguage

TINY = {"vision": Path("resources/backbones/clip-tiny"), "language": Path("resources/backbones/qwen2-tiny")}


def write_tokens(mixture: Path, out: Path, directories: Mapping[str, Path], template: str = "qwen") -> Path:
    """The mixture as the model in ``directories`` reads it (see :func:`mmpipe.models.llava.text_side`)."""
    model = VisionLanguage(vision="clip-tiny", language="qwen2-tiny")
    tokenizer, image_tokens = load_tokenizer(directories, model)
    encoder = TextEncoder(
        template=get_template(template, tokenizer),
        tokenizer=tokenizer,
        image_token=IMAGE_TOKEN,
        tokens_per_image=image_tokens,
    )
    tokenise(mixture / "records.arrow", encoder, out, max_bad=0, log=lambda line: None)
    manifest.write(out, kind="tokens", spec="{}", inputs={})
    return out
