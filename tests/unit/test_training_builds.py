"""A training that is killed while it compiles holds up nobody."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from mmpipe.artifacts.builds import build_directory, guard_builds
from mmpipe.training.stop import Stopped, StopSignal

COMPILE = """
import sys, time
from pathlib import Path
from mmpipe.artifacts.builds import BuildLock
lock = BuildLock(Path(sys.argv[1]), lambda: None)
lock.try_acquire()
Path(sys.argv[1]).touch()  # torch's own, which a killed process leaves behind
print("compiling", flush=True)
time.sleep(60)
"""


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """A lock as torch makes it for an operator, while a request to stop is an event."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "FileBaton", cpp_extension.FileBaton)
    stop_signal = StopSignal()
    guard_builds(lambda: stop_signal.leave_if_signalled(tmp_path))
    folder = Path(cpp_extension._get_build_directory("operator", verbose=False))
    return folder, lambda: cpp_extension.FileBaton(str(folder / "lock")), stop_signal.signalled


def test_operators_are_compiled_in_a_folder_of_this_environment_and_machine(builds, tmp_path, monkeypatch):
    folder, *_ = builds
    assert folder.parent == build_directory()  # also when it is asked for again
    assert folder.parent.parent == tmp_path / "mmpipe"
    names = {folder.parent.name}
    for change in (("torch.__version__", "3.0"), ("sys.prefix", "/elsewhere"), ("platform.node", lambda: "other")):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        monkeypatch.setattr(*change)
        names.add(build_directory().name)
    assert len(names) == 4


def test_a_lock_that_a_killed_process_left_is_taken_over(builds):
    folder, baton, _ = builds
    (folder / "lock").touch()
    began = time.monotonic()
    lock = baton()
    assert lock.try_acquire()
    assert time.monotonic() - began < 1
    assert not (folder / "lock").exists()
    lock.release()
    assert baton().try_acquire()


def test_a_process_waits_for_one_that_compiles_until_it_ends_or_a_stop_is_requested(builds, caplog):
    folder, baton, requested = builds
    command = [sys.executable, "-c", COMPILE, str(folder / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "compiling\n"
            threading.Timer(0.3, requested.set).start()
            with caplog.at_level("INFO"), pytest.raises(Stopped, match="before the first step"):
                baton().try_acquire()
            assert f"waiting for process {other.pid}, which compiles" in caplog.text
            requested.clear()
            threading.Timer(0.3, other.kill).start()
            assert baton().try_acquire()
            assert other.wait(5)
        finally:
            other.kill()
    assert not (folder / "lock").exists()
