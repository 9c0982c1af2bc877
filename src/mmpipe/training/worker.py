"""One process of a training job that torchrun started: ``python -m mmpipe.training.worker job.json``."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from pydantic import TypeAdapter

from mmpipe.artifacts import hashes
from mmpipe.artifacts.files import read_json
from mmpipe.errors import MmpipeError, explained
from mmpipe.escapes import LogFormatter
from mmpipe.stages import stage_kinds
from mmpipe.stages.base import StageJob, TrainStage
from mmpipe.training import launch, stop


def read_description(path: Path) -> tuple[TrainStage, StageJob]:
    """The stage and the job of :func:`mmpipe.training.launch.write_description`.

    Raises MmpipeError when torchrun started another number of processes than were asked for: nodes that do not find
    each other would each train a model of their own.
    """
    content = read_json(path)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != content["processes"]:
        raise MmpipeError(f"{content['processes']} processes were asked for, but WORLD_SIZE is {started}")
    hashes.learn(content["hashes"])
    stage = stage_kinds()[content["kind"]].model_validate(content["settings"])
    assert isinstance(stage, TrainStage)
    return stage, TypeAdapter(StageJob).validate_python(content["job"])


def main() -> None:
    rank = os.environ.get("RANK", "0")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter(f"%(asctime)s %(levelname)s [{rank}] %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    stop.die_with_parent()
    # before torch starts its threads: they inherit a blocked SIGTERM and leave it to the thread that waits for it
    with stop.StopSignal().listening(leave_with_parent=True) as stop_signal:
        stage, job = read_description(Path(sys.argv[1]))
        try:
            from mmpipe.training.run import work

            work(stage, job, stop_signal)
        except MmpipeError as error:
            launch.note_failure(job, rank, str(error))
            logging.error("%s", error)
            _leave(1)
        except Exception as error:
            launch.note_failure(job, rank, f"{explained(error)}; the traceback is in {job.log}")
            logging.exception("unexpected failure")
            _leave(1)
    _leave(0)


def _leave(status: int) -> None:
    """End without running destructors: DeepSpeed's sometimes abort the process, and NCCL's wait for dead ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
