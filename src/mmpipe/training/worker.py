"""One process of a training job that torchrun started: ``python -m mmpipe.training.worker job.json``."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from mmpipe.training.launch import read_description
from mmpipe.training.run import work


def main() -> None:
    rank = os.environ.get("RANK", "0")
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s %(levelname)s [{rank}] %(message)s", stream=sys.stderr
    )
    stage, job = read_description(Path(sys.argv[1]))
    work(stage, job)


if __name__ == "__main__":
    main()
