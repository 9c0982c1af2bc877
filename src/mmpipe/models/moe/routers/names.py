"""The names of the routers, without importing them: settings are read where torch is not."""

from __future__ import annotations

import pkgutil
from pathlib import Path

from mmpipe.errors import ConfigError, did_you_mean
from mmpipe.registry import source_file

_SHARED = frozenset({"base", "names"})


def known() -> list[str]:
    """The routers of this package."""
    found = (info.name for info in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in found if name not in _SHARED and not name.startswith("_"))


def check_name(name: str) -> None:
    """Raise ValueError unless ``name`` is a router of this package, or ``package.module:Class`` of a module that is
    there."""
    if ":" in name:
        try:
            source_file(name)
        except ConfigError as error:
            raise ValueError(f"router '{name}': {error}") from None
    elif name not in known():
        raise ValueError(f"there is no router '{name}'{did_you_mean(name, known())}")
