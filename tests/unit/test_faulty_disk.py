"""A disk that fails at every file operation in turn: nothing half is visible, the error names file and remedy, and the
same call goes on afterwards."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faulty_server as server
import pytest

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import sha256, staged_directory, write_json
from mmpipe.artifacts.state import COMPLETE, drop_progress, open_state
from mmpipe.errors import MmpipeError, explained
from mmpipe.provenance import records
from mmpipe.sources.url import Url


class Disk:
    """Counts the operations that change files below a folder, and lets one of them fail."""

    def __init__(self) -> None:
        self.folder, self.fatal, self.errno, self.seen = "", -1, 0, 0
        self.fsync = os.fsync
        sys.addaudithook(self.watch)  # hooks stay for good: this one does nothing outside of the block

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder or event not in ("open", "os.rename", "os.mkdir", "os.link", "os.truncate"):
            return
        if event == "open" and not (
            set(arguments[1] or "") & set("wax+") or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        ):
            return
        names = [str(name) for name in arguments[:2] if isinstance(name, (str, Path))]
        if any(name.startswith(self.folder) or not name.startswith("/") for name in names):
            self.step(names[-1] if event != "open" else names[0])

    def step(self, name: str | None) -> None:
        self.seen += 1
        if self.seen == self.fatal:
            raise OSError(self.errno, os.strerror(self.errno), *([name] if name else []))

    def sync(self, descriptor: int) -> None:
        if self.folder:
            self.step(None)  # as the system does: it knows no name
        self.fsync(descriptor)

    @contextmanager
    def failing(self, folder: Path, operation: int, number: int) -> Iterator[None]:
        self.folder, self.fatal, self.errno, self.seen = str(folder), operation, number, 0
        try:
            yield
        finally:
            self.folder = ""


DISK = Disk()


@pytest.fixture(autouse=True)
def _fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", DISK.sync)


def publish(version: int) -> None:
    with staged_directory(Path("results/run/model")) as staged:
        for name in ("a.bin", "folder/b.bin"):
            (staged / name).parent.mkdir(exist_ok=True)
            (staged / name).write_bytes(bytes([version]) * 1000)
        manifest.write(staged, kind="checkpoint", spec=json.dumps({"version": version}), inputs={})


def record(version: int) -> None:
    records.write("results/run/score.json", {"input_checksums": {"results/x": f"sha256:{version}"}})


def plain(version: int) -> None:
    write_json(Path("results/run/score.json"), {"accuracy": version})


def state(version: int) -> None:
    with open_state(Path("results/run/state"), f"version {version}") as resumable:
        path = Path("results/run/state/progress.json")
        assert not path.exists() or (resumable and json.loads(path.read_text()) == {"of": version})
        write_json(path, {"of": version})


WORKS = {work.__name__: work for work in (publish, record, plain, state)}
ERRORS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "ESTALE", "EIO")


def whole(folder: Path) -> bool:
    """Whether every visible JSON file is whole, and every manifest true of all that it lists."""
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix == ".json":
            content = json.loads(path.read_text())
            if path.name == manifest.NAME and not any(part.startswith(".") for part in path.parts[-4:]):
                files = content["files"].items()
                if any(sha256(path.parent / name) != facts["sha256"] for name, facts in files):
                    return False
    return True


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def every_failure(
    root: Path, work: Callable[[], None], number: int, prepare: Callable[[], None] = lambda: None
) -> Iterator[BaseException]:
    """Let each operation of ``work`` fail in turn, then run it undisturbed; gives the errors."""
    operation = 0
    while True:
        operation += 1
        prepare()
        try:
            with DISK.failing(root, operation, number):
                work()
        except (OSError, MmpipeError) as error:
            if DISK.seen < operation:
                raise  # without a fault
            yield error
        if DISK.seen < operation:
            return


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("what", WORKS)
def test_a_failure_of_any_operation_leaves_no_half_artifact(what, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = WORKS[what]
    work(2)
    expected = tree(tmp_path)
    failures = 0
    for error in every_failure(tmp_path, lambda: work(2), getattr(errno, name), prepare=lambda: work(1)):
        failures += 1
        message = explained(error)
        assert "results/" in message or str(tmp_path) in message, message
        assert "run the same command again" in message, message
        assert whole(tmp_path), (what, name, failures)
        work(2)
        assert tree(tmp_path) == expected, (what, name, failures)
    assert failures >= 2


@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "EACCES"])
def test_a_download_goes_on_after_a_failure_of_any_operation(name, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    with server.running() as host:
        address = host.serve("/a.bin", server.content(bytes(range(256)) * 100))
        source = Url.model_validate({"files": [{"url": address, "to": "a.bin"}]})

        def fetch() -> None:
            out = Path("resources/datasets/a")
            manifest.write(out, kind="source", spec="{}", inputs={}, **source.fetch(out))

        failures = 0
        for error in every_failure(tmp_path, fetch, getattr(errno, name)):
            failures += 1
            assert whole(tmp_path)
            assert "run the same command again" in explained(error) or isinstance(error, MmpipeError)
        assert failures >= 3
        assert Path("resources/datasets/a/a.bin").read_bytes() == bytes(range(256)) * 100


def test_a_folder_on_another_file_system_is_filled_by_copies(tmp_path, monkeypatch):
    """A model folder may be a link to another disk: a file cannot be renamed into it."""
    monkeypatch.chdir(tmp_path)
    rename = os.replace

    def replace(origin: Path, target: Path) -> None:
        if Path(origin).parent != Path(target).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(origin), None, str(target))
        rename(origin, target)

    monkeypatch.setattr(os, "replace", replace)
    publish(1)
    publish(2)
    assert manifest.read(Path("results/run/model"))["spec"] == {"version": 2}
    assert whole(tmp_path)
    assert not list(Path("results/run").glob(".*"))


def test_a_figure_that_cannot_be_written_leaves_the_earlier_one(tmp_path):
    from mmpipe.plotting import figure

    path = tmp_path / "a.svg"

    def draw(height: float) -> None:
        with figure(path, 1, 1, (1, 1)) as axes:
            axes[0, 0].plot([0, height])

    draw(1)
    first = path.read_bytes()
    draws = []
    for _ in every_failure(tmp_path, lambda: draw(2), errno.ENOSPC, prepare=lambda: draw(1)):
        draws.append(path.read_bytes() == first)
    assert draws
    assert all(draws)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.svg"]
    assert path.read_bytes() != first


def test_progress_does_not_depend_on_the_clock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state(1)
    monkeypatch.setattr(time, "time", lambda: 1.0)
    os.utime("results/run/state/fingerprint.json", (1, 1))
    with open_state(Path("results/run/state"), "version 1") as resumable:
        assert resumable


def test_progress_that_cannot_be_removed_does_not_look_complete(tmp_path, monkeypatch):
    """An accepted training whose disk fails while its checkpoints are removed."""
    checkpoint = tmp_path / "state/checkpoints/checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / COMPLETE).touch()
    (checkpoint / "optimizer.pt").touch()
    monkeypatch.setattr(os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ESTALE, "stale")))
    drop_progress(tmp_path / "model")
    assert not (checkpoint / COMPLETE).exists()
