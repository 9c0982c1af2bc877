"""Starting a stage's processes: in this one, through torchrun on this machine, or through srun and torchrun on several."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mmpipe import slurm
from mmpipe.artifacts.files import read_json, write_json
from mmpipe.errors import MmpipeError
from mmpipe.stages import stage_kinds
from mmpipe.stages.base import StageJob, TrainStage
from mmpipe.training import deepspeed, stop

log = logging.getLogger(__name__)

FAILURE = "failure.json"
"""A file in the state directory: which process failed first, and why."""


def run(stage: TrainStage, job: StageJob) -> None:
    """Do a stage's work with one process a GPU, on as many machines as the job has.

    Raises MmpipeError when GPUs were granted but PyTorch finds none, or when a process failed.
    """
    machines = max(1, len(job.hosts))
    _require_gpus(job.gpus // machines)
    engine = zero_kind(stage)
    if machines > 1:
        run_processes(stage, job, max(machines, job.gpus))
    elif job.gpus > 1 or engine:
        # DeepSpeed wants a process group even for one process
        run_processes(stage, job, max(1, job.gpus))
    else:
        from mmpipe.training.run import work

        with stop.Requests().listening() as requests:
            work(stage, job, requests)


def zero_kind(stage: TrainStage) -> str | None:
    """How DeepSpeed spreads the training; None for plain training."""
    wanted = stage.hardware.deepspeed
    if wanted and not deepspeed.installed():
        log.info(
            "DeepSpeed is not installed: training with plain data parallelism instead of %s; the result is the same, "
            "the memory is not (pip install 'mmpipe[deepspeed]')",
            wanted,
        )
        return None
    return wanted


def _require_gpus(wanted: int) -> None:
    import torch

    if wanted and torch.cuda.device_count() < wanted:
        raise MmpipeError(
            f"the job was given {wanted} GPU(s), but PyTorch {torch.__version__} sees {torch.cuda.device_count()}; "
            "install a CUDA build of torch, or run on the CPU with --profile local"
        )


def run_processes(stage: TrainStage, job: StageJob, processes: int) -> None:
    """Work with ``processes`` processes, spread evenly over the job's machines.

    The first process that fails ends all others at once. A request to stop is passed on.
    """
    description = job.state_dir / "job.json"
    write_description(description, stage, job, processes)
    (job.state_dir / FAILURE).unlink(missing_ok=True)
    machines = max(1, len(job.hosts))
    each, rest = divmod(processes, machines)
    if rest:
        raise MmpipeError(f"{processes} processes cannot be spread evenly over {machines} machines")
    command = (on_nodes if machines > 1 else on_this_machine)(job, each, description)
    log.info("starting %s", shlex.join(command))
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, job.threads // each))}
    killed = False
    with (
        _passing_on(job.state_dir),
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=_as_child
        ) as launched,
    ):
        for line in launched.stdout or ():
            killed = killed or "Signal 9 (SIGKILL)" in line or "oom_kill" in line
            log.info("%s", line.rstrip())
    if launched.returncode:
        raise MmpipeError(_explanation(job, launched.returncode, killed, shlex.join(command)))


def on_this_machine(job: StageJob, each: int, description: Path) -> list[str]:
    """torchrun's command for one machine."""
    return [*_torchrun(each), "--standalone", *_worker(description)]


def on_nodes(job: StageJob, each: int, description: Path) -> list[str]:
    """The command that starts torchrun on every node of the Slurm job.

    The nodes meet at the first one, under the name Slurm knows it by. Each tells the others that same name of itself
    (``--local-addr``): a host name of Debian resolves to 127.0.1.1 at home, and ranks would wait for a master nobody reaches.
    """
    job_id = slurm.job_id() or "0"
    torchrun = [
        *_torchrun(each),
        f"--nnodes={len(job.hosts)}",
        "--rdzv-backend=c10d",
        f"--rdzv-id={job_id}",
        f"--rdzv-endpoint={job.hosts[0]}:{20000 + int(job_id) % 20000}",
    ]
    script = f"trap '' TERM; exec {shlex.join(torchrun)} --local-addr=\"$SLURMD_NODENAME\" {shlex.join(_worker(description))}"
    return [
        *("srun", f"--nodes={len(job.hosts)}", f"--ntasks={len(job.hosts)}", "--ntasks-per-node=1"),
        *(f"--cpus-per-task={job.threads}", "--kill-on-bad-exit=1", "--mpi=none"),
        *([f"--gres=gpu:{each}"] if job.gpus else []),
        *("sh", "-c", script),
    ]


def _torchrun(each: int) -> list[str]:
    module = (sys.executable, "-m", "torch.distributed.run")
    # ranks hear SIGTERM themselves; torchrun would give them half a minute
    return [*module, "--max-restarts=0", f"--nproc-per-node={each}", "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT"]


def _worker(description: Path) -> list[str]:
    return ["-m", "mmpipe.training.worker", str(description.absolute())]


def _as_child() -> None:
    stop.die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _passing_on(state_dir: Path) -> Iterator[None]:
    """Turn a SIGTERM that reaches this process into a request that the ranks find; wait for them all the same."""
    request = state_dir / stop.REQUEST

    def pass_on(*_: Any) -> None:
        log.info("asked to stop: the training saves a checkpoint first")
        request.touch()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        request.unlink(missing_ok=True)


def _explanation(job: StageJob, status: int, killed: bool, command: str) -> str:
    """What to tell about processes that failed."""
    first = job.state_dir / FAILURE
    again = f"To repeat it by hand: {command}"
    if killed:  # what the others then fail with only confuses
        return (
            f"{job.recipe} {job.stage}: a training process was killed (SIGKILL), most likely because the machine ran out of "
            "memory: raise hardware.memory_gb, or lower hardware.workers or micro_batch. Run the same command again: it goes "
            f"on from the last checkpoint. {again}"
        )
    if first.is_file():
        failure = read_json(first)
        return f"{job.recipe} {job.stage}: process {failure['rank']}: {failure['message']}\n{again}"
    return (
        f"{job.recipe} {job.stage}: a training process failed (status {status}); its traceback is in {job.log}. {again}"
    )


def note_failure(job: StageJob, rank: str, message: str) -> None:
    """Write down why a process fails; the first one counts, the others fail because of it."""
    with contextlib.suppress(FileExistsError), (job.state_dir / FAILURE).open("x") as file:
        file.write(TypeAdapter(dict[str, str]).dump_json({"rank": rank, "message": message}).decode())


def write_description(path: Path, stage: TrainStage, job: StageJob, processes: int = 1) -> None:
    """Write down a stage, its job and the number of processes for other processes."""
    write_json(
        path,
        {
            "kind": type(stage).__module__.rpartition(".")[2],
            "settings": stage.model_dump(mode="json"),
            "job": TypeAdapter(StageJob).dump_python(job, mode="json"),
            "processes": processes,
        },
    )


def read_description(path: Path) -> tuple[TrainStage, StageJob]:
    """The stage and the job that :func:`write_description` wrote down.

    Raises MmpipeError when torchrun started another number of processes than were asked for: nodes that do not find
    each other would each train a model of their own.
    """
    content = read_json(path)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != content["processes"]:
        raise MmpipeError(f"{content['processes']} processes were asked for, but WORLD_SIZE is {started}")
    stage = stage_kinds()[content["kind"]].model_validate(content["settings"])
    assert isinstance(stage, TrainStage)
    return stage, TypeAdapter(StageJob).validate_python(content["job"])
