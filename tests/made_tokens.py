"""Mixtures in the tokens of tiny models, as the rule writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmpipe.artifacts import manifest
from mmpipe.data.templates import get_template
from mmpipe.data.tokens import TextEncoder, tokenise
from mmpipe.models import llava
from mmpipe.stages.base import VisionLanguage

TINY = {
    "vision": Path("resources/backbones/clip-tiny"),
    "language": Path("resources/backbones/qwen2-tiny"),
}


def write_tokens(mixture: Path, out: Path, directories: Mapping[str, Path], template: str = "qwen") -> Path:
    """The mixture as the model in ``directories`` reads it (see :func:`mmpipe.models.llava.text_side`)."""
    model = VisionLanguage(vision="clip-tiny", language="qwen2-tiny")
    tokenizer, picture_tokens = llava.text_side(directories, model)
    encoder = TextEncoder(
        template=get_template(template, tokenizer),
        tokenizer=tokenizer,
        image_token=llava.IMAGE_TOKEN,
        image_tokens_per_picture=picture_tokens,
    )
    tokenise(mixture / "records.arrow", encoder, out, max_bad=0, log=lambda line: None)
    manifest.write(out, kind="tokens", spec="{}", inputs={})
    return out
