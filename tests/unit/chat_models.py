"""Tiny checkpoints to talk to, as a training stage or transformers would have written them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_llava
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mmpipe.artifacts import manifest
from mmpipe.chat.find import LocalCheckpoint
from mmpipe.chat.model import ChatModel
from mmpipe.chat.open import open_for_chat
from mmpipe.chat.options import LoadOptions, SamplingOptions
from mmpipe.chat.queue import RequestQueue
from mmpipe.checkpoints.save import save_checkpoint
from mmpipe.data.templates import get_template

GREEDY = SamplingOptions(temperature=0, max_tokens=12)
RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (30, 40), "blue")


def processor(template: str | None = "qwen") -> LlavaProcessor:
    made = tiny_llava.processor()
    made.chat_template = get_template(template).jinja() if template else None
    return made


def model(**changes: Any) -> LlavaForConditionalGeneration:
    made = tiny_llava.llava(**{"max_position_embeddings": 1024, **changes})
    made.generation_config.pad_token_id, made.generation_config.eos_token_id = tiny_llava.PAD, tiny_llava.EOS
    return made


def publish(out: Path, template: str = "qwen", **changes: Any) -> Path:
    """A checkpoint of ours at ``out``."""
    save_checkpoint(model(**changes), processor(template), out)
    return card(out, template)


def card(out: Path, template: str = "qwen") -> Path:
    """The manifest that makes a checkpoint one of ours."""
    manifest.write(
        out,
        kind="model",
        spec=json.dumps({"stage": "finetune"}),
        inputs={},
        recipe="tiny",
        stage="finetune",
        checkpoint={"template": template, "image_aspect": "square"},
    )
    return out


def stock(out: Path, template: str | None = "qwen", **changes: Any) -> Path:
    """A checkpoint as transformers alone writes it."""
    model(**changes).save_pretrained(out)
    processor(template).save_pretrained(out)
    return out


def talk(path: Path, queue: RequestQueue, *, ours: bool = True, options: LoadOptions | None = None) -> ChatModel:
    checkpoint = LocalCheckpoint(path, path.name, ours=ours)
    return ChatModel(checkpoint, *open_for_chat(checkpoint, options or LoadOptions()), queue)
