"""Training objectives, one file each, named after the stage."""

from __future__ import annotations

import importlib
import importlib.util

from mmpipe.stages.base import TrainStage
from mmpipe.training.objectives.base import Objective


def objective_class(stage: TrainStage) -> type[Objective]:
    """The objective of a stage class, or of its nearest base class that has one.

    The default (``pretrain``, ``finetune``) is language modelling, in ``base``.
    """
    for kind in type(stage).__mro__:
        module = f"{__name__}.{kind.__module__.rpartition('.')[2]}"
        if issubclass(kind, TrainStage) and importlib.util.find_spec(module):
            found: type[Objective] = importlib.import_module(module).OBJECTIVE
            return found
    raise TypeError(f"{type(stage).__name__} is no stage that trains")
