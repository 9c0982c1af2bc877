"""The stages a recipe can be made of, one file a stage, found by looking."""

from __future__ import annotations

import functools

from mmpipe.registry import modules
from mmpipe.stages.base import Stage


@functools.cache
def stage_kinds() -> dict[str, type[Stage]]:
    """Every stage class by the name of its module, which is the stage's name in recipes."""
    return {name: module.STAGE for name, module in modules("mmpipe.stages").items()}
