"""Reading the routers out of a published checkpoint without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from mmpipe.models.moe.hf import MIXTRAL, QWEN2_MOE
from mmpipe.models.moe.hooks import Place, place_of

_STOCK = tuple(f".{names.router}" for names in (QWEN2_MOE, MIXTRAL))
_OWN = ".router."


def router_tensors(directory: Path) -> dict[tuple[Place, str], Any]:
    """The tensors of all routers of a checkpoint as float32 arrays, by place and name (``weight``, ...).

    Stock checkpoints and those of this package's class alike; empty for a dense one.
    """
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                if _OWN in key:
                    name = key.partition(_OWN)[2]
                elif key.endswith(_STOCK):
                    name = "weight"
                else:
                    continue
                found[place_of(_without_root(key)), name] = tensors.get_tensor(key).float().numpy()
    return dict(sorted(found.items()))


def _without_root(key: str) -> str:
    """A stored name from the part on: files say ``language_model.model.layers`` or ``model.language_model.layers``."""
    return key.removeprefix("model.")
