"""The commands ``mmpipe chat`` and ``mmpipe serve``: errors are found before slow imports."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from mmpipe.chat import images
from mmpipe.chat.find import LocalCheckpoint, find
from mmpipe.chat.messages import ChatError, user_message
from mmpipe.chat.options import LoadOptions, SamplingOptions
from mmpipe.escapes import json_text, printable

if TYPE_CHECKING:
    from PIL import Image

    from mmpipe.chat.model import ChatModel
    from mmpipe.chat.queue import RequestQueue


def chat(
    checkpoint: str,
    configfile: Path,
    load: LoadOptions,
    sampling: SamplingOptions,
    image: Sequence[str],
    prompt: str | None,
    as_json: bool,
) -> None:
    """Start a conversation in the terminal, or with ``prompt`` ask once (``-`` reads it from the standard input)."""
    if as_json and prompt is None:
        raise ChatError("--json needs --prompt")
    found = find(checkpoint, configfile)
    for where in image:
        images.check(where)
    shown = [images.from_anywhere(where) for where in image]
    from mmpipe.chat.queue import RequestQueue
    from mmpipe.chat.terminal import Terminal

    with closing(RequestQueue()) as queue:
        model = open_model(found, load, queue)
        if prompt is None:
            return Terminal(model, sampling, shown).run()
        question = sys.stdin.read().strip() if prompt == "-" else prompt
        ask_once(model, question, shown, sampling, as_json)


def ask_once(
    model: ChatModel, prompt: str, shown: Sequence[Image.Image], sampling: SamplingOptions, as_json: bool
) -> None:
    """Stream the answer, or print everything about it as JSON; Ctrl-C cancels it and ends the program."""
    answer = model.answer([user_message(prompt, shown)], sampling)
    try:
        for piece in answer:
            if not as_json:
                print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        answer.cancel()
        raise
    if not as_json:
        return print()
    facts = {
        "checkpoint": model.name,
        "path": str(model.path),
        "template": model.template.name if model.template else None,
        "prompt": prompt,
        "images": len(shown),
        **dataclasses.asdict(answer.completion),
        "sampling": dataclasses.asdict(sampling),
    }
    print(json_text(facts))  # a script may show this in a terminal


def serve(
    checkpoints: Sequence[str],
    configfile: Path,
    load: LoadOptions,
    sampling: SamplingOptions,
    port: int,
    hosts: Sequence[str] = (),
) -> None:
    """Serve checkpoints on this machine until Ctrl-C. The token is read from MMPIPE_API_KEY alone: arguments are visible
    to every user of the machine."""
    found = [find(checkpoint, configfile) for checkpoint in checkpoints]
    if importlib.util.find_spec("gradio") is None:
        raise ChatError("mmpipe serve needs gradio: pip install 'mmpipe[chat]'")
    from mmpipe.chat.guard import Access
    from mmpipe.chat.queue import RequestQueue
    from mmpipe.chat.server import build, listen

    access = Access(tuple(host.lower() for host in hosts), os.environ.pop("MMPIPE_API_KEY", "").strip() or None)

    with closing(RequestQueue()) as queue:
        models = {one.name: open_model(one, load, queue) for one in found}
        if len(models) < len(found):
            raise ChatError(f"the same checkpoint twice: {found[0].name}")
        listen(build(models, sampling, access=access), port, queue)


def open_model(checkpoint: LocalCheckpoint, options: LoadOptions, queue: RequestQueue) -> ChatModel:
    """Load a checkpoint to answer the requests of ``queue``."""
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    from mmpipe.chat.model import ChatModel
    from mmpipe.chat.open import open_for_chat

    return ChatModel(checkpoint, *open_for_chat(checkpoint, options), queue)
