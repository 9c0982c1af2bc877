"""The slurm profile on a real Slurm: two nodes on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def on_slurm(project, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the slurm profile as it stands, looking at the jobs more often than a real cluster would like."""
    quick = ("--slurm-init-seconds-before-status-checks", "3", "--latency-wait", "5")
    return project.snakemake("--profile", "slurm", *quick, *arguments, check=check)


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
    project.edit("config/recipes/demo.yaml", lambda r: r["stages"]["pretrain"].update(minimum_supervised=1.0))
    project.edit("config/recipes/demo.yaml", lambda r: r["stages"]["pretrain"].update(template="qwen"))
    result = on_slurm(project, "pretrained", "--retries", "0", check=False)
    assert result.returncode != 0
    assert "of the text tokens are supervised" in result.stdout
