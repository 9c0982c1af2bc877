"""A copy of the project with a demo so small that the whole workflow runs in half a minute."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
PARTS = ("Snakefile", "rules", "workflow", "profiles", "config", "envs", "src", "local", "gpu", "slurm")


class Project:
    """A working copy in which Snakemake runs."""

    def __init__(self, root: Path, python: str = sys.executable) -> None:
        self.root, self.python = root, python

    def snakemake(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run Snakemake here; output and errors in one text."""
        command = [self.python, "-m", "snakemake", "--nocolor", *arguments]
        if "--profile" not in arguments:
            command += ["--cores", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        result = subprocess.run(
            command, cwd=self.root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if check:
            assert result.returncode == 0, result.stdout
        return result

    def interpreted_by(self, python: str) -> Project:
        """This project, run by another Python."""
        return Project(self.root, python)

    def planned(self, *targets: str) -> Counter[str]:
        """How many jobs of each rule a dry run lists."""
        output = self.snakemake("-n", *targets).stdout
        table = re.search(r"job\s+count\n[-\s]+\n(.*?)\ntotal", output, re.S)
        if not table:
            assert "Nothing to be done" in output, output
            return Counter()
        return Counter({name: int(count) for name, count in (line.split() for line in table[1].splitlines())})

    def edit(self, file: str, change: Any) -> None:
        """Load a YAML file, let ``change`` alter it, write it back."""
        path = self.root / file
        content = yaml.safe_load(path.read_text())
        change(content)
        path.write_text(yaml.safe_dump(content, sort_keys=False))

    def copy(self, target: Path) -> Project:
        """The same state of affairs elsewhere, time stamps and Snakemake's memory included."""
        shutil.copytree(self.root, target, symlinks=True)
        return Project(target, self.python)


def shrink(project: Project) -> None:
    """Cut the demo down to a few records and steps."""

    def small_recipe(recipe: dict[str, Any]) -> None:
        for stage in recipe["stages"].values():
            if "data" in stage:
                stage |= {"max_steps": 3, "batch_size": 8}
        recipe.setdefault("hardware", {})["checkpoint_every"] = 1

    def small_data(catalogue: dict[str, Any]) -> None:
        catalogue["shapes-captions"]["options"] = {"records": 24}
        catalogue["shapes-conversations"]["options"] = {"records": 24}
        catalogue["shapes-crowd"]["options"] |= {"records": 24}
        catalogue["digits"]["options"] = {"records": 8}
        catalogue["shapes-mmbench"]["options"] = {"questions": 6}
        catalogue["shapes-presence"]["options"] = {"records": 8}
        catalogue["shapes-preferences"]["options"] = {"pairs": 16}
        catalogue["shapes-pope"]["options"] = {"questions": 4}

    def small_backbones(catalogue: dict[str, Any]) -> None:
        catalogue["clip-tiny"]["options"] = {"hidden_size": 32, "layers": 2, "training_steps": 2}
        for name in ("qwen2-tiny", "qwen2-mini"):
            catalogue[name]["options"] = {"hidden_size": 32, "layers": 2}

    def one_recipe(config: dict[str, Any]) -> None:
        config["recipes"] = ["demo"]
        config["benchmarks"] = [b for b in config["benchmarks"] if "pope" not in b]

    for recipe in ("demo", "demo-mod", "demo-sft"):
        project.edit(f"config/recipes/{recipe}.yaml", small_recipe)
    project.edit("config/config.yaml", one_recipe)
    project.edit("config/datasets.yaml", small_data)
    project.edit("config/backbones.yaml", small_backbones)


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that ``make`` fills once for all workers of a test run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    made = folder.with_name(f"{name}.made")
    with folder.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory, quick_python: str) -> Project:
    """The shrunken project before anything ran. Not to be changed: copy it."""

    def make(root: Path) -> None:
        root.mkdir()
        for part in PARTS:
            source = REPOSITORY / part
            if source.is_symlink():
                (root / part).symlink_to(os.readlink(source))
            elif source.is_dir():
                shutil.copytree(source, root / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            else:
                shutil.copy2(source, root / part)
        shrink(Project(root))

    return Project(once(tmp_path_factory, "fresh", make), quick_python)


@pytest.fixture(scope="session")
def finished(fresh: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The shrunken project after the whole demo ran, every job a new interpreter. Not to be changed: copy it."""

    def make(root: Path) -> None:
        fresh.copy(root).interpreted_by(sys.executable).snakemake("results/mmbench.json", "all")

    return Project(once(tmp_path_factory, "finished", make), fresh.python)


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A finished project of the test's own."""
    return finished.copy(tmp_path / "project")
