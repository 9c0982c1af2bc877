"""The modules of a package as a registry: a new source, stage or benchmark is one new file, and no list to edit."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mmpipe.errors import ConfigError, did_you_mean


@cache
def names(package: str) -> tuple[str, ...]:
    """The modules of ``package`` that define something to register, without importing them.

    Modules named ``base`` or ``spec`` are shared by the others and left out, as are private ones and packages.
    """
    found = importlib.import_module(package)
    every = sorted(info.name for info in pkgutil.iter_modules(found.__path__) if not info.ispkg)
    return tuple(name for name in every if not name.startswith("_") and name not in ("base", "spec"))


@cache
def modules(package: str) -> dict[str, ModuleType]:
    """Import every module of ``package`` that defines something to register; keys are the module names."""
    return {name: importlib.import_module(f"{package}.{name}") for name in names(package)}


def _look_here() -> None:
    """Make modules in the working directory importable: a user's own are beside ``config/``."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)


def source_file(path: str) -> Path:
    """The file that defines the module of ``package.module:name``; the module itself is not imported.

    Raises ConfigError when there is no such module, or it is no Python file.
    """
    module_name = path.partition(":")[0]
    _look_here()
    try:
        found = importlib.util.find_spec(module_name)
    except (ModuleNotFoundError, ValueError) as error:
        raise ConfigError(f"there is no module '{module_name}' ({error})") from error
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise ConfigError(
            f"there is no module '{module_name}': put {module_name.replace('.', '/')}.py into {os.getcwd()}"
        )
    return Path(found.origin)


def load_object(path: str, where: str) -> Any:
    """Import ``package.module:name``, also from the working directory.

    Raises ConfigError, opened by ``where``, when the module or the name does not exist.
    """
    module_name, _, name = path.partition(":")
    if not name:
        raise ConfigError(f"{where}: '{path}' should read 'package.module:name'")
    _look_here()
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


def export_source_dir(source: str) -> None:
    """Let every process started from here import mmpipe from ``source``, whatever is installed."""
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", source)]
    os.environ["PYTHONPATH"] = os.pathsep.join([source, *others])
