"""Results made by an earlier version are kept: a dry run over a finished demo finds nothing to do.

``tests/fixtures/demo_jobs.json`` holds what Snakemake recorded when the earlier version made the demo: the inputs and params of
each output. After a change that is meant to make results again, write it anew:

    make demo && python tests/workflow/test_earlier_results.py .
"""

from __future__ import annotations

import ast
import base64
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from project_fixtures import PARTS, REPOSITORY, Project

FIXTURE = REPOSITORY / "tests/fixtures/demo_jobs.json"
METADATA = Path(".snakemake/metadata")


def metadata(output: str) -> Path:
    """The file in which Snakemake records how ``output`` was made."""
    return METADATA / base64.urlsafe_b64encode(output.encode()).decode()


@pytest.fixture
def made_before(tmp_path: Path) -> Project:
    """The project with empty files in place of the outputs, and the record of how they were made."""
    for part in PARTS:
        if (REPOSITORY / part).is_dir() and not (REPOSITORY / part).is_symlink():
            shutil.copytree(REPOSITORY / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(REPOSITORY / part, tmp_path / part, follow_symlinks=False)
    (tmp_path / METADATA).mkdir(parents=True)
    for job in json.loads(FIXTURE.read_text()):
        for output in job["outputs"]:
            path = tmp_path / output
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if path.name == "shards" else path.touch()
            if path.name == "manifest.json":
                path.write_text(json.dumps({"spec": json.loads(ast.literal_eval(job["params"][0])), "inputs": {}}))
            os.utime(path, (0, 0))
            record = {"input": job["input"], "params": job["params"], "record_format_version": 6, "incomplete": False}
            (tmp_path / metadata(output)).write_text(json.dumps(record))
    return Project(tmp_path)


def test_nothing_is_made_again(made_before):
    assert not made_before.planned("results/mmbench.json", "all")


def test_the_record_is_compared(made_before):
    made_before.edit("config/recipes/demo.yaml", lambda r: r["stages"]["finetune"].update(learning_rate=0.5))
    planned = made_before.planned("results/mmbench.json")
    assert planned["finetune"] == 1
    assert "pretrain" not in planned


def jobs_of(project: Path) -> list[dict[str, list[str]]]:
    """The jobs whose outputs are there, as Snakemake recorded them, in a stable order."""
    jobs: dict[str, dict[str, list[str]]] = {}
    for path in sorted((project / METADATA).iterdir()):
        output = base64.urlsafe_b64decode(path.name).decode()
        if (project / output).exists():
            record = {key: json.loads(path.read_text())[key] for key in ("input", "params", "log")}
            jobs.setdefault(json.dumps(record), {"outputs": [], **record})["outputs"].append(output)
    return sorted(
        ({k: v for k, v in job.items() if k != "log"} for job in jobs.values()), key=lambda job: job["outputs"]
    )


if __name__ == "__main__":
    FIXTURE.write_text(json.dumps(jobs_of(Path(sys.argv[1])), indent=1) + "\n")
