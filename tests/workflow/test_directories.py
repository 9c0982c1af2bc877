"""The project in a directory with an odd name, its virtual environment inside it."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
from project_fixtures import REPOSITORY, Project


def test_jobs_run_in_a_directory_with_an_odd_name(fresh: Project, tmp_path: Path) -> None:
    root = fresh.copy(tmp_path / "it's [#1] (ü) & {more};").root
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--symlinks", root / ".venv"], check=True)
    (packages,) = (root / ".venv/lib").glob("python*/site-packages")
    (packages / "all.pth").write_text("\n".join(site.getsitepackages()))
    made = "resources/datasets/digits/manifest.json"
    Project(root, str(root / ".venv/bin/python")).snakemake(made)
    assert (root / made).is_file()


def install(root: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """``make install`` in ``root``, with a Python that only says what it is asked for."""
    (root / "envs").mkdir(parents=True)
    (root / "envs/requirements.lock").touch()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, root)
    python = root / "python"
    python.write_text('#!/bin/sh\nprintf "<%s>" "$@"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python"\n')
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "install", "PYTHON=./python", *settings]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["plain", "my project", "it's [#1] (ü) & more;", "~a*?%=,|<>"])
def test_make_quotes_the_directory(name: str, tmp_path: Path) -> None:
    result = install(tmp_path / name)
    assert result.returncode == 0, result.stderr
    assert "<-m><venv><.venv>" in result.stdout
    assert (tmp_path / name / ".venv/.installed").is_file()


@pytest.mark.parametrize("name", ['say "hi"', "a$HOME", "a`id`", "a\\b", "a:b", "a{b}", "a\nb"])
def test_a_directory_where_no_virtual_environment_works_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    result = install(tmp_path / name)
    assert result.returncode
    assert "a virtual environment does not work in a directory with a line break or one of" in result.stderr
    assert "venv" not in result.stdout.replace("virtual", "")
    elsewhere = install(tmp_path / "other" / name, f"VENV={tmp_path / 'venv'}")
    assert elsewhere.returncode == 0, elsewhere.stderr
