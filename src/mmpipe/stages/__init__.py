"""Stage settings: one class and one file a stage of a recipe, without torch.

:mod:`mmpipe.training` runs the stages; ``training/objectives/`` has a stage's objective under the same file name.
"""

from __future__ import annotations

import functools

from mmpipe.registry import modules
from mmpipe.stages.base import Stage


@functools.cache
def stage_kinds() -> dict[str, type[Stage]]:
    """Every stage class by the name of its module, which is the stage's name in recipes."""
    return {name: module.STAGE for name, module in modules("mmpipe.stages").items()}
