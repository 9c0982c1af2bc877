"""Two jobs on one machine never hold the same card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from mmpipe.errors import MmpipeError
from mmpipe.gpu_locks import VISIBLE, locked_gpus

HOLD = """
import json, os, sys, time
from pathlib import Path
from mmpipe.gpu_locks import locked_gpus
with locked_gpus(int(sys.argv[1]), folder=Path(sys.argv[2]), poll=0.02):
    print(json.dumps(os.environ["CUDA_VISIBLE_DEVICES"]), flush=True)
    time.sleep(float(sys.argv[3]))
"""


@pytest.fixture(autouse=True)
def four_cards(monkeypatch):
    monkeypatch.setenv(VISIBLE, "0,1,2,MIG-5:3")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def hold(count: int, folder, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(count), str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def cards_of(process: subprocess.Popen) -> set[str]:
    return set(json.loads(process.stdout.readline()).split(","))


def test_jobs_hold_different_cards_and_a_killed_one_gives_its_back(tmp_path):
    first, second = hold(2, tmp_path, 60), hold(2, tmp_path, 60)
    try:
        mine, theirs = cards_of(first), cards_of(second)
        assert len(mine) == len(theirs) == 2
        assert not mine & theirs
        first.kill()
        first.wait()
        with locked_gpus(2, folder=tmp_path, poll=0.02):
            assert set(os.environ[VISIBLE].split(",")) == mine
        assert os.environ[VISIBLE] == "0,1,2,MIG-5:3"
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_a_job_waits_until_enough_cards_are_free(tmp_path):
    with hold(3, tmp_path, 0.4) as other:
        cards_of(other)
        began = time.monotonic()
        with locked_gpus(2, folder=tmp_path, poll=0.02):
            assert time.monotonic() - began > 0.2


def test_two_jobs_that_want_more_than_a_half_both_finish(tmp_path):
    done = []

    def work() -> None:
        for _ in range(5):
            with hold(3, tmp_path, 0) as process:
                done.append(len(cards_of(process)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert done == [3] * 10


def test_too_few_cards_are_an_error(tmp_path):
    with (
        pytest.raises(MmpipeError, match=r"given 8 GPU\(s\), but this machine shows 4"),
        locked_gpus(8, folder=tmp_path),
    ):
        pass


def test_slurm_and_jobs_without_gpus_need_no_lease(tmp_path, monkeypatch):
    with locked_gpus(0, folder=tmp_path / "none"):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with locked_gpus(64, folder=tmp_path / "none"):
        assert os.environ[VISIBLE] == "0,1,2,MIG-5:3"
    assert not (tmp_path / "none").exists()
