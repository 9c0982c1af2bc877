"""Which copy of this library jobs import."""

from __future__ import annotations

import os


def tell_jobs(source: str) -> None:
    """Let every process started from here import mmpipe from ``source``, whatever is installed."""
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", source)]
    os.environ["PYTHONPATH"] = os.pathsep.join([source, *others])
