"""Starting a stage's processes: in this one, or one for each GPU through torchrun."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from pydantic import TypeAdapter

from mmpipe.artifacts.files import read_json, write_json
from mmpipe.errors import MmpipeError
from mmpipe.stages import stage_kinds
from mmpipe.stages.base import StageJob, TrainStage

log = logging.getLogger(__name__)


def run(stage: TrainStage, job: StageJob) -> None:
    """Do a stage's work with as many processes as the job has GPUs.

    Raises MmpipeError when GPUs were granted but PyTorch finds none, or when a process failed.
    """
    import torch

    if job.gpus and torch.cuda.device_count() < job.gpus:
        raise MmpipeError(
            f"the job was given {job.gpus} GPU(s), but PyTorch {torch.__version__} sees {torch.cuda.device_count()}; "
            "install a CUDA build of torch, or run on the CPU with --profile local"
        )
    if job.gpus <= 1:
        from mmpipe.training.run import work

        work(stage, job)
        return
    run_processes(stage, job, job.gpus)


def run_processes(stage: TrainStage, job: StageJob, processes: int) -> None:
    """The same through torchrun on this machine."""
    description = job.state_dir / "job.json"
    write_description(description, stage, job)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"),
        f"--nproc-per-node={processes}",
        *("-m", "mmpipe.training.worker", str(description)),
    ]
    log.info("starting %s", " ".join(command))
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, job.threads // processes))}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as launched:
        for line in launched.stdout or ():
            log.info("%s", line.rstrip())
    if launched.returncode:
        raise MmpipeError(
            f"{job.recipe} {job.stage}: a training process failed (status {launched.returncode}); its traceback is in "
            f"{job.log}. To repeat it by hand: {' '.join(command)}"
        )


def write_description(path: Path, stage: TrainStage, job: StageJob) -> None:
    """Write down a stage and its job for other processes."""
    write_json(
        path,
        {
            "kind": type(stage).__module__.rpartition(".")[2],
            "settings": stage.model_dump(mode="json"),
            "job": TypeAdapter(StageJob).dump_python(job, mode="json"),
        },
    )


def read_description(path: Path) -> tuple[TrainStage, StageJob]:
    """The stage and the job that :func:`write_description` wrote down."""
    content = read_json(path)
    stage = stage_kinds()[content["kind"]].model_validate(content["settings"])
    assert isinstance(stage, TrainStage)
    return stage, TypeAdapter(StageJob).validate_python(content["job"])
