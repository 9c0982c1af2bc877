"""Launching a stage: in this process, with torchrun on this machine, or with srun and torchrun on several."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mmpipe import slurm
from mmpipe.artifacts import hashes, manifest
from mmpipe.artifacts.files import read_object, write_json
from mmpipe.errors import MmpipeError
from mmpipe.stages.base import StageJob, TrainStage
from mmpipe.training import deepspeed, stop

log = logging.getLogger(__name__)

FAILURE = "failure.json"
"""File in the state directory with the first failed process and its error."""
WORKER = "mmpipe.training.worker"
"""The module that torchrun starts in every process, with the description of the stage and its job."""


def run(stage: TrainStage, job: StageJob, work: Callable[[TrainStage, StageJob, stop.StopSignal], None]) -> None:
    """Run a stage's ``work`` with one process per GPU, on all machines of the job.

    One process runs ``work`` itself, several run :data:`WORKER`. Raises MmpipeError when GPUs were granted but PyTorch
    finds none, or when a process failed.
    """
    machines = max(1, len(job.hosts))
    if wanted := job.gpus // machines:
        import torch

        if (found := torch.cuda.device_count()) < wanted:
            raise MmpipeError(
                f"the job was given {wanted} GPU(s), but PyTorch {torch.__version__} sees {found}; "
                "install a CUDA build of torch, or run on the CPU with --profile local"
            )
    # DeepSpeed needs a process group even for one process
    if max(machines, job.gpus) > 1 or deepspeed.usable(stage.hardware.deepspeed):
        run_processes(stage, job, max(machines, job.gpus))
    else:
        with stop.StopSignal().listening() as stop_signal:
            work(stage, job, stop_signal)


def run_processes(stage: TrainStage, job: StageJob, processes: int) -> None:
    """Run ``processes`` workers, spread evenly over the job's machines.

    The first process that fails ends all others at once. A request to stop is passed on.
    """
    for path in job.manifests:  # once, not in every process
        manifest.check_all(path.parent)
    description = job.state_dir / "job.json"
    write_description(description, stage, job, processes)
    (job.state_dir / FAILURE).unlink(missing_ok=True)
    machines = max(1, len(job.hosts))
    each, rest = divmod(processes, machines)
    if rest:
        raise MmpipeError(f"{processes} processes cannot be spread evenly over {machines} machines")
    command = _command(job, each, description)
    log.info("starting %s", shlex.join(command))
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, job.threads // each))}
    killed = False
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with (
        _passing_on(job.state_dir),
        subprocess.Popen(command, env=environment, **pipes, preexec_fn=_as_child) as launched,
    ):
        for line in launched.stdout or ():
            killed = killed or "Signal 9 (SIGKILL)" in line or "oom_kill" in line
            log.info("%s", line.rstrip())
    if launched.returncode:
        raise MmpipeError(_explanation(job, launched.returncode, killed, shlex.join(command)))


def _command(job: StageJob, each: int, description: Path) -> list[str]:
    """torchrun's command with ``each`` workers per machine; srun starts it on every node of a job with several.

    The rendezvous is the first node, by its Slurm name. Each node announces its Slurm name (``--local-addr``): Debian
    resolves a machine's own host name to 127.0.1.1, which other nodes cannot reach.
    """
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", "--max-restarts=0", f"--nproc-per-node={each}"),
        # ranks handle SIGTERM themselves, and hear of others from this process; torchrun would give them half a minute
        "--signals-to-handle=SIGQUIT",
    ]
    worker = ["-m", WORKER, str(description.absolute())]
    if len(job.hosts) <= 1:
        return [*torchrun, "--standalone", *worker]
    job_id, nodes = slurm.job_id() or "0", len(job.hosts)
    torchrun += [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-id={job_id}"]
    torchrun += [f"--rdzv-endpoint={job.hosts[0]}:{20000 + int(job_id) % 20000}"]
    script = f"trap '' TERM; exec {shlex.join(torchrun)} --local-addr=\"$SLURMD_NODENAME\" {shlex.join(worker)}"
    return [
        *("srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"),
        *(f"--cpus-per-task={job.threads}", "--kill-on-bad-exit=1", "--mpi=none"),
        *([f"--gres=gpu:{each}"] if job.gpus else []),
        *("sh", "-c", script),
    ]


def _as_child() -> None:
    stop.die_with_parent()
    for number in stop.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _passing_on(state_dir: Path) -> Iterator[None]:
    """Turn a request to stop into a file that the ranks read, and keep waiting for them. A second Ctrl-C ends this
    process, and the ranks with it."""
    request, requested = state_dir / stop.REQUEST, stop.StopSignal()

    def pass_on(number: int, _: Any) -> None:
        requested.receive(number)
        log.info("asked to stop (%s): the training saves a checkpoint first", requested.reason)
        request.write_text(requested.reason, encoding="ascii")

    before = {number: signal.signal(number, pass_on) for number in stop.heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        request.unlink(missing_ok=True)


def _explanation(job: StageJob, status: int, killed: bool, command: str) -> str:
    """The message about processes that failed."""
    stage, again = f"{job.recipe} {job.stage}", f"To repeat it by hand: {command}"
    if killed:  # the errors of the other processes follow from it
        return (
            f"{stage}: a training process was killed (SIGKILL), most likely because the machine ran out of "
            "memory: raise hardware.memory_gb, or lower hardware.workers or micro_batch. Run the same command again: it goes "
            f"on from the last checkpoint. {again}"
        )
    if (job.state_dir / FAILURE).is_file():
        failure = read_object(job.state_dir / FAILURE)
        return f"{stage}: process {failure['rank']}: {failure['message']}\n{again}"
    return f"{stage}: a training process failed (status {status}); its traceback is in {job.log}. {again}"


def note_failure(job: StageJob, rank: str, message: str) -> None:
    """Record a process's error; only the first is recorded, the others follow from it."""
    with contextlib.suppress(FileExistsError), (job.state_dir / FAILURE).open("x") as file:
        file.write(TypeAdapter(dict[str, str]).dump_json({"rank": rank, "message": message}).decode())


def write_description(path: Path, stage: TrainStage, job: StageJob, processes: int = 1) -> None:
    """Write a stage, its job and the number of processes for :mod:`mmpipe.training.worker`."""
    write_json(
        path,
        {
            "kind": type(stage).__module__.rpartition(".")[2],
            "settings": stage.model_dump(mode="json"),
            "job": TypeAdapter(StageJob).dump_python(job, mode="json"),
            "processes": processes,
            "hashes": hashes.known(),
        },
    )
