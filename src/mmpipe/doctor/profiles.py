"""Finding and reading Snakemake's profiles the way it does itself."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mmpipe.settings import read_mapping

# as snakemake.profiles looks for them
_FILES = ("profile.yaml", "config.v9+.yaml", "config.yaml")


def find(name: str, root: Path) -> Path | None:
    """The directory of the profile ``name``: a path, one of the project's, or one of the user's."""
    for folder in (root / name, root / "profiles" / name, Path.home() / ".config/snakemake" / name):
        if file_of(folder):
            return folder
    return None


def file_of(folder: Path) -> Path | None:
    """The file of a profile's directory."""
    return next((folder / name for name in _FILES if (folder / name).is_file()), None)


def read(folder: Path) -> Mapping[str, Any]:
    """What a profile says. Raises ConfigError when it is not YAML."""
    file = file_of(folder)
    return read_mapping(file) if file else {}


@cache
def known_keys() -> frozenset[str]:
    """Every option of Snakemake and of its installed plugins: a profile can say each."""
    from snakemake.cli import get_argument_parser

    actions = get_argument_parser()._actions
    return frozenset(
        option.lstrip("-") for action in actions for option in action.option_strings if option.startswith("--")
    )
