"""Rendering chat templates that come with a checkpoint, in a process that can be ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mmpipe.errors import DataError

_SECONDS = 10
"""Processor time of one conversation."""
_PATIENCE = 120.0
"""Seconds until an answer, on a busy machine and with the start of the process."""
_lock = threading.Lock()
_workers: dict[int, tuple[subprocess.Popen[bytes], Connection]] = {}
"""The process that renders, by the id of the one that asks: a fork starts its own."""


def render_chat(
    template: str, messages: Sequence[Any], where: str, **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation in a Jinja template, and the spans of its ``{% generation %}`` blocks.

    ``options`` are those of transformers' ``render_jinja_template``. Raises DataError, with ``where`` as the template's
    origin, when the template fails, does not end, or takes too much memory.
    """
    request = {"messages": list(messages), "options": {"chat_template": template, **options}, "seconds": _SECONDS}
    with _lock:
        found = _ask(json.dumps(request, default=lambda value: f"<{type(value).__name__}>").encode())
    if "error" in found:
        raise DataError(f"the chat template of {where} cannot be used: {found['error']}")
    return found["text"], [(start, end) for start, end in found["spans"]]


def _ask(request: bytes) -> dict[str, Any]:
    process, connection = _worker()
    try:
        connection.send_bytes(request)
        if connection.poll(_PATIENCE):
            return dict(json.loads(connection.recv_bytes()))
        problem = f"no answer within {_PATIENCE:.0f} s"
    except (EOFError, OSError):
        problem = f"it does not end, or takes too much memory ({_SECONDS} s and 1 GiB are allowed)"
    _workers.pop(os.getpid())
    connection.close()
    process.kill()
    process.wait()
    return {"error": problem}


def _worker() -> tuple[subprocess.Popen[bytes], Connection]:
    known = _workers.get(os.getpid())
    if known and known[0].poll() is None:
        return known
    ours, theirs = Pipe()
    with theirs:
        descriptor = theirs.fileno()
        command = [sys.executable, str(Path(__file__).with_name("render_worker.py")), str(descriptor)]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, pass_fds=[descriptor], stdin=subprocess.DEVNULL, env=environment)
    _workers[os.getpid()] = (process, ours)
    return _workers[os.getpid()]
