"""The names of the routers, without importing them: settings are read where torch is not."""

from __future__ import annotations

import pkgutil
from pathlib import Path

from mmpipe.errors import did_you_mean

_SHARED = frozenset({"base", "names"})


def known() -> list[str]:
    """The routers of this package."""
    found = (info.name for info in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in found if name not in _SHARED and not name.startswith("_"))


def check_name(name: str) -> None:
    """Raise ValueError unless ``name`` is a router of this package or looks like ``package.module:Class``."""
    if ":" not in name and name not in known():
        raise ValueError(f"there is no router '{name}'{did_you_mean(name, known())}")
