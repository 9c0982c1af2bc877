"""The slurm profile on a real Slurm: two nodes on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmpipe.artifacts.files import read_jsonl

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("slurmctld") is None or os.geteuid() != 0,
        reason="needs root and Debian's packages slurm-wlm and munge",
    ),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    script = Path(__file__).with_name("mini-cluster")
    subprocess.run([script, "start"], check=True)
    yield
    subprocess.run([script, "stop"], check=True)


QUICK = ("--profile", "slurm", "--slurm-init-seconds-before-status-checks", "3", "--latency-wait", "5")
"""The profile as it stands, looking at the jobs more often than a real cluster would like."""

MANIFEST = "results/demo/pretrain/model/manifest.json"


def on_slurm(project, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return project.interpreted_by(sys.executable).snakemake(*QUICK, *arguments, check=check)


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.1)
    return found


class Training:
    """The stage ``pretrain`` of a finished project, trained again on the cluster with other settings."""

    def __init__(self, project, steps: int, **hardware: Any) -> None:
        self.project = project
        project.edit("config/recipes/demo.yaml", lambda r: r["stages"]["pretrain"].update(max_steps=steps))
        project.edit("config/recipes/demo.yaml", lambda r: r["hardware"].update(checkpoint_every=10000, **hardware))
        self.root = project.root / "results/demo/pretrain"

    def start(self, *arguments: str) -> subprocess.Popen:
        """Snakemake in the background, its output in a file."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        command = [sys.executable, "-m", "snakemake", "--nocolor", MANIFEST, *QUICK, *arguments]
        with (self.project.root / "output").open("w") as output:
            return subprocess.Popen(
                command, cwd=self.project.root, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def output(self) -> str:
        return (self.project.root / "output").read_text()

    def steps(self) -> int:
        history = self.root / "state/history.jsonl"
        return len(history.read_text().splitlines()) if history.is_file() else 0

    def job(self) -> str:
        return slurm("squeue", "--noheader", "--states=RUNNING", "--partition=gpu", "--format=%i")

    def finished_steps(self) -> list[int]:
        return [row["step"] for row in read_jsonl(self.root / "report/history.jsonl")]

    def log(self) -> str:
        return (self.project.root / "logs/demo/pretrain.log").read_text()


@pytest.mark.usefixtures("cluster")
def test_the_demo_runs_on_slurm(finished, fresh, tmp_path):
    project = fresh.copy(tmp_path / "project")
    output = on_slurm(project, "results/mmbench.json").stdout
    assert "has been submitted with SLURM jobid" in output
    assert (project.root / "results/mmbench.json").is_file()
    ours = json.loads((project.root / "results/mmbench.json").read_text())
    theirs = json.loads((finished.root / "results/mmbench.json").read_text())
    assert [row["lineage"] for row in ours["rows"]] == [row["lineage"] for row in theirs["rows"]]


@pytest.mark.usefixtures("cluster")
def test_a_failed_job_shows_its_log(fresh, tmp_path):
    project = fresh.copy(tmp_path / "project")
    project.edit("config/recipes/demo.yaml", lambda r: r["stages"]["pretrain"].update(min_supervised_fraction=1.0))
    project.edit("config/recipes/demo.yaml", lambda r: r["stages"]["pretrain"].update(template="qwen"))
    result = on_slurm(project, "pretrained", "--retries", "0", check=False)
    assert result.returncode != 0
    assert "of the text tokens are supervised" in result.stdout


@pytest.mark.usefixtures("cluster")
def test_two_nodes_train_one_stage(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    training = Training(project, steps=3, nodes=2)
    on_slurm(project, MANIFEST, "--forcerun", "pretrain")
    assert "3 steps of 8 samples: 2 process(es) x 1 accumulated x 4" in training.log()
    here, there = (
        torch.tensor([row["loss"] for row in read_jsonl(p.root / "results/demo/pretrain/report/history.jsonl")])
        for p in (finished, project)
    )
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("cluster")
def test_a_preempted_training_goes_on_after_it_was_queued_again(finished, tmp_path):
    training = Training(finished.copy(tmp_path / "project"), steps=600)
    with training.start("--retries", "0") as process:
        wait_for(lambda: training.steps() >= 5)
        job = training.job()
        slurm("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        wait_for(lambda: slurm("squeue", "--noheader", f"--jobs={job}", "--format=%T") == "PENDING")
        stopped = training.steps()
        assert json.loads((training.root / "state/stopped.json").read_text())["step"] == stopped
        # Slurm lets a job rest for two minutes before it runs again
        wait_for(lambda: not slurm("squeue", "--noheader", "--partition=urgent", "--states=RUNNING"))
        slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
        assert process.wait(300) == 0, training.output()
    assert f"from step {stopped}" in training.log()
    assert training.finished_steps() == list(range(1, 601))


@pytest.mark.usefixtures("cluster")
def test_a_cancelled_training_goes_on_when_it_is_run_again(finished, tmp_path):
    training = Training(finished.copy(tmp_path / "project"), steps=600)
    with training.start("--retries", "0") as process:
        wait_for(lambda: training.steps() >= 5)
        slurm("scancel", training.job())
        assert process.wait(300) == 1, training.output()
    stopped = training.steps()
    with training.start() as process:
        assert process.wait(300) == 0, training.output()
    assert f"from step {stopped}" in training.log()
    assert training.finished_steps() == list(range(1, 601))


@pytest.mark.usefixtures("cluster")
def test_a_training_longer_than_its_time_limit_queues_itself_again(finished, tmp_path):
    # more than any machine trains in a minute
    training = Training(finished.copy(tmp_path / "project"), steps=100_000, runtime_minutes=1)
    with training.start("--retries", "0") as process:
        job = wait_for(training.job)
        wait_for(lambda: slurm("squeue", "--noheader", f"--jobs={job}", "--format=%T") == "PENDING", 90)
        record = json.loads((training.root / "state/stopped.json").read_text())
        assert record["reason"] == "time limit"
        slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
        # Slurm plans once a minute, and holds back a job that was queued again
        wait_for(lambda: training.steps() > record["step"], 240)
        slurm("scancel", training.job())
        process.wait(300)  # Snakemake asks for the state of jobs less and less often
    assert f"from step {record['step']}" in training.log()
