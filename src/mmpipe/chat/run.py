"""What ``mmpipe chat`` does: everything that can be wrong is found before anything slow is imported."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from mmpipe.chat.find import Found, find
from mmpipe.chat.images import check, from_anywhere
from mmpipe.chat.messages import ChatError, Sampling
from mmpipe.chat.options import Loading

if TYPE_CHECKING:
    from mmpipe.chat.model import ChatModel
    from mmpipe.chat.queue import Desk


def chat(
    checkpoint: str,
    configfile: Path,
    loading: Loading,
    sampling: Sampling,
    images: Sequence[str],
    prompt: str | None,
    as_json: bool,
) -> None:
    """Talk, or with ``prompt`` ask once (``-`` reads it from the standard input)."""
    found = find(checkpoint, configfile)
    for where in images:
        check(where)
    shown = [from_anywhere(where) for where in images]
    from mmpipe.chat.queue import Desk
    from mmpipe.chat.terminal import Terminal, aloud, once

    with closing(Desk()) as desk:
        model = open_model(found, loading, desk)
        if prompt is None:
            return Terminal(model, sampling, shown).run()
        question = sys.stdin.read().strip() if prompt == "-" else prompt
        if as_json:
            # control characters are escaped: a script may show this in a terminal
            return print(json.dumps(once(model, question, shown, sampling), indent=2))
        aloud(model, question, shown, sampling)


def serve(checkpoints: Sequence[str], configfile: Path, loading: Loading, sampling: Sampling, port: int) -> None:
    """Serve checkpoints on this machine until Ctrl-C."""
    found = [find(checkpoint, configfile) for checkpoint in checkpoints]
    if importlib.util.find_spec("gradio") is None:
        raise ChatError("mmpipe serve needs gradio: pip install 'mmpipe[chat]'")
    from mmpipe.chat.queue import Desk
    from mmpipe.chat.server import build, listen

    with closing(Desk()) as desk:
        models = {one.name: open_model(one, loading, desk) for one in found}
        if len(models) < len(found):
            raise ChatError(f"the same checkpoint twice: {found[0].name}")
        listen(build(models, sampling), port, desk)


def open_model(found: Found, loading: Loading, desk: Desk) -> ChatModel:
    """Load a checkpoint for talking."""
    import transformers.utils.logging as talk

    talk.set_verbosity_error()
    if not sys.stderr.isatty():
        talk.disable_progress_bar()
    from mmpipe.chat.model import ChatModel
    from mmpipe.chat.open import open_for_chat

    return ChatModel(open_for_chat(found, loading), desk)
