"""Asking Slurm: answers, silence, and what a lock makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from mmpipe import slurm
from mmpipe.artifacts.state import open_state
from mmpipe.errors import ArtifactError, MmpipeError

HOLD = """
import sys
from pathlib import Path
from mmpipe.artifacts.state import open_state
with open_state(Path(sys.argv[1]), "x"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def says(tmp_path, monkeypatch):
    """Let commands of Slurm answer: name -> shell script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def answer(**scripts: str) -> None:
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    return answer


UNKNOWN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
AWAY = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"


@pytest.mark.parametrize(
    ("script", "expected"), [("echo RUNNING", "RUNNING"), (UNKNOWN, "GONE"), ("true", "GONE"), (AWAY, None)]
)
def test_a_job_s_state(says, script, expected):
    says(squeue=script)
    assert slurm.state("7") == expected


def test_a_controller_that_hangs_is_no_answer(says, monkeypatch):
    monkeypatch.setattr(slurm, "_SECONDS", 0.1)
    says(squeue="sleep 5")
    assert slurm.state("7") is None


@pytest.mark.parametrize("answer", ["N/A", "UNLIMITED", "NONE", ""])
def test_a_job_without_a_limit_has_no_end(says, answer):
    says(squeue=f"echo {answer}")
    assert slurm.end_time("7") is None


def test_the_end_of_a_job_is_local_time(says):
    says(squeue="echo 2026-11-21T05:00:00")
    assert slurm.end_time("7") == datetime(2026, 11, 21, 5).timestamp()


def test_the_nodes_of_a_job(says):
    says(squeue="echo 'n[1-2]'", scontrol="printf 'n1\\nn2\\n'")
    assert slurm.hosts("7") == ("n1", "n2")


def test_a_controller_that_stays_away_is_named(says):
    says(squeue=AWAY)
    with pytest.raises(MmpipeError, match="the controller does not answer"):
        slurm.hosts("7", patience=0.05)


@pytest.fixture
def held(tmp_path, monkeypatch):
    """A state directory that another process holds; ``held(job)`` says which Slurm job that is."""
    started = []

    def hold(job: str | None) -> Path:
        if job:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        state = tmp_path / "state"
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(state)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        return state

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def refusal(state: Path) -> str:
    with pytest.raises(ArtifactError) as error, open_state(state, "x"):
        pass
    return str(error.value)


def test_a_lock_names_the_process_to_stop(says, held):
    state = held(None)
    pid = json.loads(state.with_name("state.lock").read_text())["pid"]
    assert f"stop it (kill {pid})" in refusal(state)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo RUNNING", "Slurm job 7 (RUNNING)"),
        (AWAY, "Slurm job 7 (Slurm does not answer)"),
        (UNKNOWN, "is left over: Slurm does not know its job 7 any more"),
    ],
)
def test_a_lock_of_a_slurm_job_has_the_jobs_state(says, held, answer, expected):
    state = held("7")
    says(squeue=answer)
    assert expected in refusal(state)


def test_without_shared_locks_slurm_decides_whether_the_last_holder_lives(says, tmp_path, monkeypatch):
    state = tmp_path / "state"
    lock = tmp_path / "state.lock"
    left = json.dumps({"host": "n2", "pid": 5, "slurm_job": "7"})
    lock.write_text(left)
    says(squeue="echo RUNNING")
    assert "scancel 7" in refusal(state)
    assert lock.read_text() == left
    # the job itself, queued again, may go on
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with open_state(state, "x"):
        pass
    assert lock.read_text() == ""
    lock.write_text(left)
    monkeypatch.delenv("SLURM_JOB_ID")
    says(squeue=UNKNOWN)
    with open_state(state, "x"):
        pass
