"""Finding the modules of a package by looking: a new source, stage or benchmark is one new file, and no list to edit."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import Any

from mmpipe.errors import ConfigError, did_you_mean


@cache
def names(package: str) -> tuple[str, ...]:
    """The modules of ``package`` that define something to register, without importing them.

    Modules named ``base`` or ``spec`` hold what the others share and are left out, as are private ones.
    """
    found = importlib.import_module(package)
    every = sorted(info.name for info in pkgutil.iter_modules(found.__path__))
    return tuple(name for name in every if not name.startswith("_") and name not in ("base", "spec"))


@cache
def modules(package: str) -> dict[str, ModuleType]:
    """Import every module of ``package`` that defines something to register; keys are the module names."""
    return {name: importlib.import_module(f"{package}.{name}") for name in names(package)}


def load_object(path: str, where: str) -> Any:
    """Import ``package.module:name``.

    Raises ConfigError, opened by ``where``, when the module or the name does not exist.
    """
    module_name, _, name = path.partition(":")
    if not name:
        raise ConfigError(f"{where}: '{path}' should read 'package.module:name'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{where}: there is no module '{module_name}' ({error})") from error
    try:
        return getattr(module, name)
    except AttributeError:
        public = [n for n in vars(module) if not n.startswith("_")]
        hint = did_you_mean(name, public)
        raise ConfigError(f"{where}: '{module_name}' has no '{name}'{hint}") from None
