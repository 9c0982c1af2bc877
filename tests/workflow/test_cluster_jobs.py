"""What a job asks a cluster for, and which code it runs."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import Any

import pytest

MANIFEST = "results/demo/pretrain/model/manifest.json"


@pytest.fixture
def asked(finished, tmp_path, monkeypatch):
    """What the stage ``pretrain`` asks sbatch for on some hardware: its options, as the Slurm plugin writes them."""
    project = finished.copy(tmp_path / "project")
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, script in {
        "sbatch": f'echo "$@" >{tmp_path}/asked; exit 1',
        "sinfo": "echo 'gpu*'",
        **dict.fromkeys(("squeue", "sacct", "sacctmgr", "sshare", "scontrol"), "exit 1"),
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")

    def on(hardware: dict[str, Any], recipe: dict[str, Any]) -> None:
        recipe["hardware"].update(hardware)
        for stage in recipe["stages"].values():
            stage["batch_size"] = 64  # for every GPU to have a share

    def ask(config: dict[str, Any] | None = None, **hardware: Any) -> set[str]:
        project.edit("config/recipes/demo.yaml", partial(on, hardware))
        project.edit("config/config.yaml", lambda content: content.update(config or {}))
        once = ("--retries", "0", "--forcerun", "pretrain")
        project.snakemake(MANIFEST, "--profile", "slurm", *once, check=False)
        return set((tmp_path / "asked").read_text().split("--wrap")[0].split())

    return ask


def test_more_gpus_than_a_machine_has_become_several_machines(asked):
    assert {"--gpus=16", "--nodes=2", "--ntasks=2", "--requeue"} <= asked(gpus=16)


def test_gres_counts_the_gpus_of_one_machine(asked):
    found = asked({"gpu_request": "gres", "gpus_per_node": 4}, gpus=8)
    assert {"--gres=gpu:4", "--nodes=2", "--ntasks=2"} <= found


def test_one_machine_gets_one_copy_of_the_job(asked):
    found = asked(gpus=8)
    assert "--gpus=8" in found
    assert not [option for option in found if option.startswith(("--nodes", "--ntasks-per-gpu"))]


def test_gpus_that_do_not_fill_machines_are_an_error(fresh, tmp_path):
    project = fresh.copy(tmp_path / "project")
    project.edit("config/recipes/demo.yaml", lambda recipe: recipe["hardware"].update(gpus=12))
    result = project.snakemake("-n", MANIFEST, "--profile", "slurm", check=False)
    assert result.returncode != 0
    assert "stages.pretrain: hardware.gpus: 12 GPUs do not fill whole machines of 8" in result.stdout


def test_jobs_run_the_code_the_plan_was_made_with(fresh, tmp_path):
    """Another mmpipe is installed in this environment; jobs use the checkout beside the Snakefile."""
    project = fresh.copy(tmp_path / "project").interpreted_by(sys.executable)
    card = "resources/backbones/qwen2-tiny/manifest.json"
    (project.root / "src/mmpipe/__init__.py").write_text('__version__ = "of this checkout"\n')
    project.snakemake(card)
    assert json.loads((project.root / card).read_text())["mmpipe"] == "of this checkout"
