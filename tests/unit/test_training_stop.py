"""Stopping in time, and knowing when that is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from mmpipe.artifacts import state
from mmpipe.artifacts.files import read_json, read_jsonl
from mmpipe.errors import explained
from mmpipe.report.figures import draw_history
from mmpipe.report.pages import settings_page
from mmpipe.stages.finetune import Finetune
from mmpipe.training import launch, stop
from mmpipe.training.run import run_stage


def finetune(**changes) -> Finetune:
    settings = {"data": "mix", "template": "qwen", "batch_size": 8, "max_steps": 6, "learning_rate": 1e-3}
    return Finetune(**{**settings, **changes})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_a_stop_request_inside_the_block(number):
    requests = stop.StopSignal()
    before = [signal.getsignal(each) for each in stop.SIGNALS]
    with requests.listening():
        os.kill(os.getpid(), number)
        # the handler runs between waits when another thread took the signal
        assert any(requests.signalled.wait(0.1) for _ in range(50))
    assert requests.reason == number.name
    assert [signal.getsignal(each) for each in stop.SIGNALS] == before
    assert not {*stop.SIGNALS} & signal.pthread_sigmask(signal.SIG_BLOCK, [])


LISTEN = """
import sys
from mmpipe.training.stop import StopSignal
with StopSignal().listening() as stop_signal:
    print("ready", flush=True)
    for seconds in sys.stdin:
        print(stop_signal.signalled.wait(float(seconds)), stop_signal.reason, flush=True)
"""


@contextmanager
def listening(*ignored: signal.Signals) -> Iterator[tuple[subprocess.Popen, Callable[[float], str]]]:
    """A process that listens, and a function that asks it whether it is to stop, within some seconds."""

    def ignore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    command, pipes = [sys.executable, "-c", LISTEN], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, bufsize=1, preexec_fn=ignore, **pipes) as process:
        assert process.stdout.readline() == "ready\n"

        def asked(seconds: float) -> str:
            process.stdin.write(f"{seconds}\n")
            return process.stdout.readline().strip()

        try:
            yield process, asked
        finally:
            process.kill()


def test_a_pause_is_no_stop_request_and_a_second_interrupt_ends_the_process():
    with listening() as (process, asked):
        for _ in range(3):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.3)  # longer than it waits for a signal at a time
            process.send_signal(signal.SIGCONT)
        assert asked(0.5) == "False"
        process.send_signal(signal.SIGTERM)
        assert asked(5) == "True SIGTERM"
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None  # the first one
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 128 + signal.SIGINT


def test_a_process_started_to_ignore_hangups_and_interrupts_does_but_heeds_sigterm():
    """As processes below torchrun are."""
    with listening(*stop.SIGNALS) as (process, asked):
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)
        assert asked(0.5) == "False"
        process.send_signal(signal.SIGTERM)
        assert asked(5) == "True SIGTERM"


def test_the_deadline_leaves_room_for_what_is_slow():
    deadline = stop.Deadline(time.time() + 1000, checkpoint_bytes=0)
    assert not deadline.near()
    deadline.step, deadline.checkpoint = 200, 100
    assert not deadline.near()
    deadline.checkpoint = 300
    assert deadline.near()


def test_a_training_whose_time_is_up_saves_and_goes_on(job, monkeypatch):
    asked = []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(stop.slurm, "requeue", lambda job: asked.append(job) or True)
    made = job("run", end_time=time.time() - 1)
    with pytest.raises(stop.Stopped, match=r"stopped at step 1 \(time limit\) .* Slurm runs the job again"):
        run_stage(finetune(), made)
    assert asked == ["7"]
    monkeypatch.setattr(stop.slurm, "requeue", lambda job: False)
    with pytest.raises(stop.Stopped, match=r"stopped at step 2 .* run the same command again"):
        run_stage(finetune(), made)
    made = job("run")
    run_stage(finetune(), made)
    assert read_json(made.model_dir / "manifest.json")["steps"] == 6
    assert not (made.state_dir / stop.RECORD).exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/3"),
        RuntimeError('Error while serializing: I/O error: Os { message: "No space left on device" }'),
    ],
)
def test_a_full_disk_is_named_however_it_shows(error):
    assert "the disk is full: free some space" in explained(error)
    assert "disk is full" not in explained(ValueError("something else"))


def test_a_full_disk_inside_torch_save_is_named():
    with pytest.raises(RuntimeError) as caught:
        torch.save({"a": torch.ones(1 << 18)}, "/dev/full")
    assert "the disk is full: free some space" in explained(caught.value)
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises((RuntimeError, OSError)) as caught:
        torch.save({"a": torch.ones(1 << 18)}, file)
    assert "the disk is full: free some space" in explained(caught.value)


def test_a_killed_data_loading_process_is_explained():
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert "raise hardware.memory_gb, or lower hardware.workers" in explained(killed)
    assert "memory" not in explained(RuntimeError("DataLoader worker (pid 7) is killed by signal: Aborted. "))


KILLED = """
import os, signal, sys
from pathlib import Path
from mmpipe.artifacts.state import noticing_a_kill
with noticing_a_kill(Path(sys.argv[1]), print):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_start_says_that_a_single_process_was_killed(tmp_path, monkeypatch):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    mark = (tmp_path / state.RUNNING).read_bytes()

    def said() -> list[str]:
        (tmp_path / state.RUNNING).write_bytes(mark)
        found: list[str] = []
        with state.noticing_a_kill(tmp_path, found.append):
            pass
        return found

    kills = state._oom_kills()["oom_kills"]
    monkeypatch.setattr(state, "_oom_kills", lambda: {"oom_kills": kills})
    (text,) = said()
    assert re.search(r"the last run of this training \(process \d+ on .*\) was killed \(kill -9\); it goes on", text)
    monkeypatch.setattr(state, "_oom_kills", lambda: {"oom_kills": kills + 1})
    assert "ran out of memory: raise hardware.memory_gb, or lower hardware.workers or micro_batch" in said()[0]
    mark = b"{"  # killed while it wrote the mark
    assert said() == []
    with pytest.raises(ValueError, match="an error"), state.noticing_a_kill(tmp_path, pytest.fail):
        raise ValueError("an error")
    assert not (tmp_path / state.RUNNING).exists()  # every other end removes the mark


def test_checkpoints_that_are_being_removed_do_not_look_complete(tmp_path, monkeypatch):
    from mmpipe.artifacts import state
    from mmpipe.training import resume

    checkpoints = tmp_path / "state/checkpoints"
    for step in (1, 2):
        folder = checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / state.COMPLETE).touch()
    assert resume.last_checkpoint(checkpoints)
    monkeypatch.setattr(state.shutil, "rmtree", lambda *_, **__: None)  # killed before it did anything
    state.drop_progress(tmp_path / "model")
    assert resume.last_checkpoint(checkpoints) is None


def test_a_checkpoint_in_progress_has_the_mode_of_the_umask(tmp_path):
    from mmpipe.training import resume

    (tmp_path / "rng").mkdir()
    for name in (resume.WEIGHTS, "rng/state.pt"):
        (tmp_path / name).touch(mode=0o600)
    before = os.umask(0o002)
    try:
        resume.mark_complete(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o664}


@pytest.fixture
def broken_images(demo_files):
    """A third of the images cannot be read any more."""
    chosen = sorted((demo_files / "resources/datasets/shapes").rglob("*.jpg"))[::3]
    assert chosen
    before = {path: path.read_bytes() for path in chosen}
    for path in chosen:
        path.write_bytes(b"")
    yield
    for path, content in before.items():
        path.write_bytes(content)


def test_replaced_records_are_counted_over_interruptions_and_processes(job, broken_images, tmp_path):
    whole, stopped, shared = job("run"), job("stopped", end_time=time.time() - 1), job("shared")
    run_stage(finetune(), whole)
    with pytest.raises(stop.Stopped):
        run_stage(finetune(), stopped)
    stopped = replace(stopped, end_time=None)
    run_stage(finetune(), stopped)
    shared.state_dir.mkdir(parents=True)
    launch.run_processes(finetune(), shared, 2)
    counted = [read_json(made.model_dir / "manifest.json")["records_replaced"] for made in (whole, stopped, shared)]
    assert counted[0] == counted[1] == counted[2] > 0
    rows = read_jsonl(whole.report_dir / "history.jsonl")
    assert sum(row.get("records_replaced", 0) for row in rows) == counted[0]
    settings_page(whole.model_dir / "manifest.json", tmp_path / "page.html")
    assert f"<th>records replaced</th><td>{counted[0]}</td>" in (tmp_path / "page.html").read_text()
    draw_history(whole.report_dir / "history.jsonl", tmp_path / "loss.svg")
