"""Directories of transformers: local files alone are read, and code that lies in them never runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mmpipe.errors import ArtifactError

_NEEDS_CODE = re.compile("trust_remote_code|custom code|does not recognize|Unrecognized")
"""How transformers says that it has no class of its own for a directory."""


def load_pretrained(kind: Any, directory: Path | None, **options: Any) -> Any:
    """``kind.from_pretrained(directory, **options)``, of local files and of classes that are installed.

    transformers would ask on the standard input whether to run code that the directory names (``auto_map``). Where it
    has a class of its own for the model, it takes that. Raises ArtifactError, naming the directory and its code, where
    it has none; other errors are those of transformers.
    """
    try:
        return kind.from_pretrained(directory, trust_remote_code=False, local_files_only=True, **options)
    except (ValueError, OSError) as error:
        code = _named_code(directory) if directory and _NEEDS_CODE.search(str(error)) else ""
        if not code:
            raise
        raise ArtifactError(
            f"{directory}: transformers has no class for it, and its own code is never run ({code}); "
            "take a model that transformers opens without trust_remote_code, or a layout that reads it (docs/backbones.md)"
        ) from error


def from_config(kind: Any, config: Any) -> Any:
    """A model of a configuration, without weights of its own and without code that the configuration names."""
    return kind.from_config(config, trust_remote_code=False)


def _named_code(directory: Path) -> str:
    """The classes that the configurations in a directory want to import from it."""
    found = []
    for path in sorted(Path(directory).glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size < 1e7 else None
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and (code := content.get("auto_map")):
            named = [f"{auto}: {where}" for auto, where in code.items()] if isinstance(code, dict) else [str(code)]
            found.append(f"auto_map of {path.name}: {', '.join(named)}")
    return "; ".join(found)
