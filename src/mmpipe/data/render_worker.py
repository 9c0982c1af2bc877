"""Render chat templates in a process of limited time and memory: ``render_worker.py FD``, started by ``rendering.py``.

A template is a program of whoever made the checkpoint. It must not import anything of this package.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

MEMORY = 1 << 30
"""Bytes of memory beyond those of this program."""
LONGEST = 1 << 24
"""Characters of a rendered conversation."""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The text and the spans of ``{% generation %}`` blocks, or the ``error``."""
    spends = resource.getrusage(resource.RUSAGE_SELF)
    until = int(spends.ru_utime + spends.ru_stime) + 1 + request["seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))
    try:
        rendered: Any = render_jinja_template([request["messages"]], **request["options"])
        marked = bool(request["options"].get("return_assistant_tokens_mask"))
        text, spans = (rendered[0][0], rendered[1][0] if marked else [])
        if len(text) > LONGEST:
            return {"error": f"it makes a text of more than {LONGEST} characters"}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:  # noqa: BLE001 whatever a template does is its fault
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    return {"text": text, "spans": spans}


def main(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the process that asks
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    connection = Connection(descriptor)
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(json.dumps(answer(request)).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]))
