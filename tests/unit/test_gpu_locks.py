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
from mmpipe.gpu_locks import VISIBLE, lock_folder, locked_gpus

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


def test_each_user_has_a_folder_of_locks_that_nobody_else_can_enter(tmp_path, monkeypatch):
    runtime, temporary = tmp_path / "runtime", tmp_path / "tmp"
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    assert lock_folder() == temporary / f"mmpipe-gpus-{os.geteuid()}"  # the runtime directory does not exist
    runtime.mkdir()
    for folder in (runtime / "mmpipe-gpus", temporary / f"mmpipe-gpus-{os.geteuid()}"):
        assert lock_folder() == folder
        with locked_gpus(2):
            assert len(list(folder.iterdir())) == 2
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {lock.stat().st_mode & 0o777 for lock in folder.iterdir()} == {0o600}
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    if os.geteuid() == 0:  # another user's runtime directory, as sudo may leave it in the environment
        os.chown(runtime, 1001, 1001)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
        assert lock_folder().parent == temporary


def make_open(folder):
    folder.mkdir(mode=0o755)


def make_link(folder):
    folder.parent.joinpath("elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "elsewhere")


def make_file(folder):
    folder.write_text("")


def make_others(folder):
    folder.mkdir(mode=0o700)
    os.chown(folder, 1001, 1001)


@pytest.mark.parametrize(
    "prepare",
    [
        make_open,
        make_link,
        make_file,
        pytest.param(make_others, marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")),
    ],
)
def test_a_folder_of_locks_that_others_can_enter_or_made_is_refused(tmp_path, prepare):
    prepare(tmp_path / "locks")
    before = (tmp_path / "locks").lstat()
    with pytest.raises(MmpipeError, match=r"locks: .* set XDG_RUNTIME_DIR"), locked_gpus(1, folder=tmp_path / "locks"):
        pass
    assert (tmp_path / "locks").lstat().st_mode == before.st_mode


def test_a_lock_that_is_a_link_is_refused_and_its_target_stays_as_it_was(tmp_path):
    victim, folder = tmp_path / "bashrc", tmp_path / "locks"
    victim.write_text("mine")
    victim.chmod(0o600)
    folder.mkdir(mode=0o700)
    (folder / "0.lock").symlink_to(victim)
    with pytest.raises(MmpipeError, match=r"0\.lock of a GPU"), locked_gpus(1, folder=folder):
        pass
    assert victim.stat().st_mode & 0o777 == 0o600
    assert victim.read_text() == "mine"
