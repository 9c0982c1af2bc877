"""What must run again and what must not, after everything that happens to results on a disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from project_fixtures import PARTS, Project

from mmpipe.jobs import job
from mmpipe.provenance import records

TARGETS = ("results/mmbench.json", "all")
TRAININGS = {"pretrain", "finetune"}
CHECKPOINT = "results/demo/finetune/model/manifest.json"


def files(project: Project) -> list[Path]:
    """The files of results and resources, records apart."""
    found = [path for root in ("results", "resources") for path in (project.root / root).rglob("*")]
    return [path for path in found if path.is_file() and ".mmpipe" not in path.parts]


def mmpipe(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [project.python, "-m", "mmpipe.cli.main", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(project.root / "src")}
    return subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True)


# ---- what must not run


def clone(project: Project, target: Path, parts: tuple[str, ...] = PARTS) -> Project:
    """A fresh clone: files have new times, and Snakemake's memory is not there."""
    target.mkdir()
    for part in parts:
        source = project.root / part
        if source.is_symlink():
            (target / part).symlink_to(os.readlink(source))
        elif source.is_dir():
            shutil.copytree(source, target / part, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(source, target / part)
    return Project(target, project.python)


def copied(project: Project, target: Path) -> Project:
    """A fresh clone with results and then resources copied into it."""
    return clone(project, target, (*PARTS, "results", "resources"))


def linked(project: Project, target: Path) -> Project:
    """A fresh clone that shares results and resources by links."""
    cloned = clone(project, target)
    for part in ("results", "resources"):
        (target / part).symlink_to(project.root / part)
    return cloned


def touched(project: Project, _: Path) -> Project:
    for number, path in enumerate(sorted(files(project), reverse=True)):
        os.utime(path, (time.time() + number,) * 2)
    return project


def with_clock_set_back(project: Project, _: Path) -> Project:
    generator = random.Random(0)
    for path in files(project):
        os.utime(path, (generator.uniform(0, 1e9),) * 2)
    return project


def with_raw_data_deleted(project: Project, _: Path) -> Project:
    shutil.rmtree(project.root / "resources/datasets")
    return project


@pytest.mark.parametrize("happens", [copied, linked, touched, with_clock_set_back, with_raw_data_deleted])
def test_equal_bytes_are_current_and_other_settings_stale_whatever_the_clock_says(project, tmp_path, happens):
    after = happens(project, tmp_path / "after")
    targets = TARGETS[:1] if happens is with_raw_data_deleted else TARGETS
    assert after.planned(*targets) == {}
    after.edit("config/recipes/demo.yaml", lambda r: r["stages"]["finetune"].update(learning_rate=0.5))
    planned = after.planned("results/mmbench.json")
    assert (planned["finetune"], planned["score_answers"], planned["pretrain"]) == (1, 2, 0)


# ---- what must run


def put_back(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Another version of a file is restored, with its old time."""
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, (time.time() - 1e6,) * 2)


def other_settings(content: bytes) -> bytes:
    manifest = json.loads(content)
    manifest["spec"]["settings"]["learning_rate"] = 5.0
    return json.dumps(manifest).encode()


def other_bytes(content: bytes) -> bytes:
    """A manifest of an equal training on other hardware."""
    manifest = json.loads(content)
    manifest["files"] = {name: facts | {"sha256": "0" * 64} for name, facts in manifest["files"].items()}
    return json.dumps(manifest).encode()


RESTORED = {
    "results/demo/pretrain/model/manifest.json": (other_settings, {"pretrain", "finetune", "answer_chunk"}, set()),
    "results/demo/pretrain/model/./manifest.json": (other_bytes, {"finetune", "answer_chunk"}, {"pretrain"}),
    "resources/backbones/qwen2-tiny/manifest.json": (other_bytes, {"pretrain", "tokenise"}, {"fetch_backbone"}),
    "results/demo/eval/mmbench/answers.jsonl": (lambda b: b[: len(b) // 2], {"answer_chunk", "compare"}, TRAININGS),
    "results/demo/eval/mmbench/score.json": (lambda b: b + b" ", {"score_answers", "compare"}, {"answer_chunk"}),
    "results/mmbench.json": (lambda b: b + b" ", {"compare"}, {"score_answers"}),
    "resources/benchmarks/mmbench/references.jsonl": (
        lambda b: b + b"\n",
        {"score_answers", "compare"},
        {"answer_chunk"} | TRAININGS,
    ),
}


@pytest.mark.parametrize("path", RESTORED)
def test_what_was_made_from_another_version_is_stale(project, path):
    change, must, must_not = RESTORED[path]
    put_back(project.root / path, change)
    planned = project.planned("results/mmbench.json")
    assert must <= planned.keys()
    assert not must_not & planned.keys()


def test_a_failed_rerun_leaves_nothing_that_calls_itself_current(project):
    """The new setting fails; then the old score is stale, and is not shown."""
    project.edit("config/recipes/demo.yaml", lambda r: r["stages"]["finetune"].update(learning_rate=1e25))
    failed = project.snakemake("results/mmbench.json", check=False)
    assert failed.returncode == 1
    assert (project.root / "results/mmbench.json").exists()
    assert {"finetune", "answer_chunk", "score_answers", "compare"} <= project.planned("results/mmbench.json").keys()
    shown = mmpipe(project, "show", "results/mmbench.json")
    assert shown.returncode != 0
    assert CHECKPOINT in shown.stderr
    why = mmpipe(project, "why", "results/mmbench.json")
    assert CHECKPOINT in why.stdout


@contextmanager
def running(project: Project, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    with (project.root / "output").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=project.root, env=environment, start_new_session=True, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for one in (process, *below):
            one.kill()
        process.wait()


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def slow_training(project: Project, steps: int = 40) -> None:
    project.edit("config/recipes/demo.yaml", lambda r: r["stages"]["finetune"].update(max_steps=steps))


def test_a_killed_rerun_goes_on_by_the_same_command(project):
    slow_training(project)
    state = project.root / "results/demo/finetune/state/checkpoints"
    with running(project, "results/mmbench.json") as process:
        wait_for(lambda: list(state.glob("checkpoint-*/complete")))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert {"finetune", "answer_chunk", "compare"} <= project.planned("results/mmbench.json").keys()
    assert mmpipe(project, "show", "results/mmbench.json").returncode != 0
    output = project.snakemake("results/mmbench.json").stdout  # no lock is in the way
    assert "resuming" in (project.root / "logs/demo/finetune.log").read_text(), output
    assert mmpipe(project, "show", "results/mmbench.json").returncode == 0


def test_a_training_that_outlives_its_run_is_accepted(project):
    slow_training(project)
    state = project.root / "results/demo/finetune/state/checkpoints"
    with running(project, CHECKPOINT) as process:
        wait_for(lambda: list(state.glob("checkpoint-*/complete")))
        below = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        psutil.wait_procs(below, timeout=120)
    published = project.root / CHECKPOINT
    assert json.loads(published.read_text())["steps"] == 40
    before = published.stat().st_mtime_ns
    assert project.planned(CHECKPOINT) == {}
    project.snakemake(CHECKPOINT)
    assert published.stat().st_mtime_ns == before
    assert not list(state.glob("checkpoint-*"))


def test_a_run_beside_a_running_one_takes_nothing_away(project, tmp_path):
    """Two clones on one results folder: one works, the other is refused with the name of the first."""
    other = linked(project, tmp_path / "clone")
    for clone in (project, other):
        slow_training(clone, 250)
    state = project.root / "results/demo/finetune/state/checkpoints"
    with running(project, CHECKPOINT) as process:
        wait_for(lambda: list(state.glob("checkpoint-*/complete")))
        refused = other.snakemake(CHECKPOINT, check=False)
        assert refused.returncode == 1, refused.stdout + (project.root / "output").read_text()
        assert f"process {process.pid}" in refused.stdout
        assert process.wait(timeout=120) == 0
    assert json.loads((project.root / CHECKPOINT).read_text())["steps"] == 250
    assert other.planned(CHECKPOINT) == {}


def test_settings_edited_while_a_job_starts_are_not_used(project):
    """The job starts with what was planned, or not at all."""
    shutil.rmtree(project.root / "results/demo/eval/mmbench")
    orders = project.root / "results/.mmpipe/orders/demo/eval/mmbench/chunks"
    before = (project.root / "config/benchmarks.yaml").read_text()
    with running(project, "results/demo/eval/mmbench/score.json") as process:
        wait_for(lambda: list(orders.glob("*.json")))
        project.edit("config/benchmarks.yaml", lambda c: c["mmbench"].update(max_new_tokens=1))
        status = process.wait(timeout=120)
    (project.root / "config/benchmarks.yaml").write_text(before)
    assert status == 1
    assert "configuration changed" in (project.root / "output").read_text()
    assert project.planned("results/demo/eval/mmbench/score.json")["answer_chunk"] == 1


def test_a_job_planned_with_other_settings_does_not_start(tmp_path, monkeypatch):
    """On a cluster, the process of a job reads the configuration anew."""
    monkeypatch.chdir(tmp_path)
    output = "results/demo/eval/pope/answers.jsonl"
    made = SimpleNamespace(
        input=[],
        output=[output],
        params={"reads": "new"},
        log=[str(tmp_path / "log")],
        resources={},
        threads=1,
        config={},
    )
    step = job(lambda snakemake, plan: pytest.fail("it ran"))
    records.write(output, {"settings": {"reads": "old"}}, records.ORDERS)
    with pytest.raises(SystemExit):
        step(made)
    assert "configuration changed" in (tmp_path / "log").read_text()
