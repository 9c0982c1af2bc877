"""What stages optimise: the objective of a stage stands in the file here that has the stage's name."""

from __future__ import annotations

import importlib
import importlib.util

from mmpipe.stages.base import TrainStage
from mmpipe.training.objectives.base import Objective


def objective_class(stage: TrainStage) -> type[Objective]:
    """The objective of the stage's kind: that of its own file or of the nearest base class that has one.

    A stage without either (``pretrain``, ``finetune``) has that of ``base``, language modelling.
    """
    for kind in type(stage).__mro__:
        module = f"{__name__}.{kind.__module__.rpartition('.')[2]}"
        if issubclass(kind, TrainStage) and importlib.util.find_spec(module):
            found: type[Objective] = importlib.import_module(module).OBJECTIVE
            return found
    raise TypeError(f"{type(stage).__name__} is no stage that trains")
