"""What several tests share: small demo files, made once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm_python
from tiny_project import make_demo_files, make_job

from mmpipe.stages.base import StageJob

pytest_plugins = ["project_fixtures"]

# the tests' models are so small that threads only get in each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")
# a test run in the background is started to ignore interrupts, and so would be every process that it tests
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Digests of the tests' files are not remembered in the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, so that the workers of a run end together."""
    long = ("tests/workflow/", "tests/kill/", "unit/test_stages_", "unit/test_training", "unit/test_lora")
    items.sort(key=lambda item: not any(part in item.path.as_posix() for part in long))


@pytest.fixture(scope="session")
def demo_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with tiny backbones, a data set and a mixture, laid out as the rules lay them out."""
    return make_demo_files(tmp_path_factory.mktemp("demo_files"))


@pytest.fixture(scope="session")
def quick_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A command like ``sys.executable`` whose processes have the heavy libraries already (see :mod:`warm_python`)."""
    with warm_python.started(tmp_path_factory.mktemp("warm")) as command:
        yield command


@pytest.fixture(scope="module")
def quick_readback(quick_python: str) -> Iterator[None]:
    """Published checkpoints are read back by processes that start quickly."""
    from mmpipe.checkpoints import roundtrip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roundtrip, "sys", SimpleNamespace(executable=quick_python))
        yield


@pytest.fixture
def job(
    demo_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_readback: None
) -> Callable[..., StageJob]:
    """Make a job that publishes below the test's own directory."""
    monkeypatch.chdir(demo_files)
    return lambda name="run", **changes: make_job(tmp_path, name, **changes)
