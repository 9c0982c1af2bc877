"""Checkpoints as others write them: one file a layout, each turning files into the stock model and back.

An entry of ``backbones.yaml`` names its ``layout``, which is the name of a module here that defines ``LAYOUT``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mmpipe import registry
from mmpipe.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from mmpipe.lineage.base import Layout


def get(name: str) -> Layout:
    """The layout called ``name``.

    Raises ConfigError when there is none.
    """
    known = registry.names(__name__)
    if name not in known:
        raise ConfigError(f"there is no layout '{name}'{did_you_mean(name, known)}")
    layout: Layout = importlib.import_module(f"{__name__}.{name}").LAYOUT
    return layout
