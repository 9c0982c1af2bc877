"""One process of a training job that torchrun started: ``python -m mmpipe.training.worker job.json``."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from mmpipe.errors import MmpipeError, explained
from mmpipe.training import launch, stop


def main() -> None:
    rank = os.environ.get("RANK", "0")
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s %(levelname)s [{rank}] %(message)s", stream=sys.stderr)
    stop.die_with_parent()
    # before torch starts its threads, so that all of them leave SIGTERM to the one that listens
    with stop.Requests().listening(leave_with_parent=True) as requests:
        stage, job = launch.read_description(Path(sys.argv[1]))
        try:
            from mmpipe.training.run import work

            work(stage, job, requests)
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
    """End without running destructors: DeepSpeed's abort the process now and then, and those of NCCL wait for dead ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
