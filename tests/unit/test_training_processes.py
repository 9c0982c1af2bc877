"""Several processes: told to stop, dying, short of memory, with batches of different kinds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
from tiny_project import half_without_images

from mmpipe.artifacts.files import read_json, read_jsonl, sha256
from mmpipe.data.sampler import BatchPlan
from mmpipe.data.tokens import TokenTable
from mmpipe.errors import MmpipeError
from mmpipe.stages.base import StageJob
from mmpipe.stages.finetune import Finetune
from mmpipe.training import launch, stop, worker

LAUNCH = """
import sys, logging
from pathlib import Path
from mmpipe.errors import MmpipeError
from mmpipe.training import launch, worker
from mmpipe.training.run import train
logging.basicConfig(level=logging.INFO)
stage, job = worker.read_description(Path(sys.argv[1]))
processes = int(sys.argv[2])
if processes > 1:
    launch.run = lambda stage, job, work: launch.run_processes(stage, job, processes)
try:
    train(stage, job)
except MmpipeError as error:
    sys.exit(f"mmpipe: {error}")
"""


# each starts processes that import torch, which is most of its time
pytestmark = pytest.mark.slow


def finetune(**changes: Any) -> Finetune:
    settings = {
        "data": "mix",
        "template": "qwen",
        "batch_size": 8,
        "max_steps": 60,
        "learning_rate": 1e-3,
        "hardware": {"checkpoint_every": 1000},
    }
    return Finetune(**{**settings, **changes})


@contextmanager
def start(stage: Finetune, job: StageJob, processes: int = 2) -> Iterator[subprocess.Popen]:
    description = job.state_dir.with_name("job.json")
    description.parent.mkdir(parents=True, exist_ok=True)
    launch.write_description(description, stage, job)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LAUNCH, str(description), str(processes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def wait_for(process: subprocess.Popen, condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps(job: StageJob) -> int:
    history = job.state_dir / "history.jsonl"
    return len(history.read_text().splitlines()) if history.is_file() else 0


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that train, first one first."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [p for p in below if "mmpipe.training.worker" in p.cmdline() and "--max-restarts=0" not in p.cmdline()]


def test_told_to_stop_it_saves_and_goes_on(job):
    """SIGTERM reaches the launcher alone: the ranks hear of it, save the step they are at, and end well."""
    made, undisturbed = job("run"), job("undisturbed")
    with start(finetune(), made) as process:
        wait_for(process, lambda: steps(made) >= 3)
        process.send_signal(signal.SIGTERM)
        output = process.communicate()[0]
    assert process.returncode == 1
    assert "run the same command again, and it goes on from there" in output
    record = read_json(made.state_dir / stop.RECORD)
    assert record["reason"] == "SIGTERM"
    assert 3 <= record["step"] < 60
    assert (made.state_dir / f"checkpoints/checkpoint-{record['step']}/complete").is_file()
    with start(finetune(), made) as process:
        output = process.communicate()[0]
    assert process.returncode == 0, output
    assert f"from step {record['step']}" in output
    with start(finetune(), undisturbed) as process:
        process.communicate()
    assert sha256(made.model_dir / "model.safetensors") == sha256(undisturbed.model_dir / "model.safetensors")
    assert sha256(made.report_dir / "history.jsonl") == sha256(undisturbed.report_dir / "history.jsonl")


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGHUP, 1), (signal.SIGINT, 2)])
def test_a_signal_to_all_processes_saves_first_and_a_second_interrupt_ends_them(job, number, processes):
    """As a terminal sends Ctrl-C, to data-loading processes too."""
    made = job("run")
    stage = finetune(hardware={"checkpoint_every": 1000, "workers": 1}, max_steps=100000)
    with start(stage, made, processes) as process:
        wait_for(process, lambda: steps(made) >= 2)
        os.killpg(process.pid, number)
        output = process.communicate(timeout=60)[0]
    record = read_json(made.state_dir / stop.RECORD)
    assert record["reason"] == number.name
    assert f"({number.name}) with a checkpoint" in output
    assert (made.state_dir / f"checkpoints/checkpoint-{record['step']}/complete").is_file()
    with start(stage, made, processes) as process:
        wait_for(process, lambda: steps(made) >= record["step"] + 2)
        ranks = workers(process)
        process.send_signal(signal.SIGSTOP)  # both are noticed at once
        os.killpg(process.pid, signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(10)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive


def test_a_process_that_is_killed_ends_the_job_at_once(job):
    made = job("run")
    with start(finetune(max_steps=100000), made) as process:
        wait_for(process, lambda: steps(made) >= 2)
        ranks = workers(process)
        assert len(ranks) == 2
        ranks[1].kill()
        began = time.monotonic()
        output = process.communicate(timeout=25)[0]
    assert time.monotonic() - began < 15
    assert "ran out of memory" in output
    assert not any(rank.is_running() for rank in ranks)


def test_training_ends_when_the_launcher_is_killed(job):
    made = job("run")
    with start(finetune(max_steps=100000), made) as process:
        wait_for(process, lambda: steps(made) >= 2)
        ranks = workers(process)
        process.kill()
        process.communicate()
    gone, alive = psutil.wait_procs(ranks, timeout=10)
    assert len(gone) == 2
    assert not alive


def test_the_first_failure_is_what_the_user_reads(job):
    made = job("run")
    made.state_dir.mkdir(parents=True)
    with pytest.raises(MmpipeError, match=r"process [01]: step \d+, records shapes/.*the loss is (nan|inf)"):
        launch.run_processes(finetune(learning_rate=1e25, max_gradient_norm=0, warmup_ratio=0, max_steps=6), made, 2)


def test_the_number_of_processes_is_checked(job, monkeypatch, tmp_path):
    launch.write_description(tmp_path / "job.json", finetune(), job("run"), processes=4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MmpipeError, match="4 processes were asked for, but WORLD_SIZE is 2"):
        worker.read_description(tmp_path / "job.json")


@pytest.mark.parametrize("kind", [None, "zero3"])
def test_a_batch_without_images_on_one_rank_does_not_hang_the_others(job, tmp_path, kind):
    if kind:
        pytest.importorskip("deepspeed")
    made = half_without_images(job("run"), tmp_path)
    table = TokenTable(made.tokens)
    plan = BatchPlan(lengths=table.words, has_image=table.has_image, micro_batch=1, world_size=2)
    images = [[table.has_image[plan.step(step, rank)[0][0]] for rank in (0, 1)] for step in range(8)]
    assert [True, False] in images
    assert [False, True] in images
    made.state_dir.mkdir(parents=True)
    launch.run_processes(finetune(batch_size=2, max_steps=8, hardware={"deepspeed": kind}), made, 2)
    assert len(read_jsonl(made.report_dir / "history.jsonl")) == 8
