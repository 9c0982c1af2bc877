"""Checkpoint layouts, one file each: conversion of files to the stock model and back.

An entry of ``backbones.yaml`` names its ``layout``, which is the name of a module here that defines ``LAYOUT``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mmpipe import registry
from mmpipe.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from mmpipe.checkpoints.layouts.base import Layout, PackedLanguage


def get(name: str) -> Layout:
    """The layout called ``name``.

    Raises ConfigError when there is none.
    """
    known = registry.names(__name__)
    if name not in known:
        raise ConfigError(f"there is no layout '{name}'{did_you_mean(name, known)}")
    layout: Layout = importlib.import_module(f"{__name__}.{name}").LAYOUT
    return layout


def packed_language(model_type: str) -> PackedLanguage | None:
    """The layout of the packed language models with this ``model_type``, if there is one."""
    from mmpipe.checkpoints.layouts.base import PackedLanguage

    layouts = (get(name) for name in registry.names(__name__))
    packed = (layout for layout in layouts if isinstance(layout, PackedLanguage))
    return next((layout for layout in packed if model_type in layout.MODEL_TYPES), None)
