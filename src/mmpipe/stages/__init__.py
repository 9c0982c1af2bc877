"""What can be set: one settings class a stage of a recipe, one file a stage, without torch.

What is done stands in :mod:`mmpipe.training`: the objective of a stage in ``training/objectives/`` under the stage's name.
"""

from __future__ import annotations

import functools

from mmpipe.registry import modules
from mmpipe.stages.base import Stage


@functools.cache
def stage_kinds() -> dict[str, type[Stage]]:
    """Every stage class by the name of its module, which is the stage's name in recipes."""
    return {name: module.STAGE for name, module in modules("mmpipe.stages").items()}
