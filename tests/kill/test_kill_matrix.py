"""Whatever moment a job is killed at, the same command ends with the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MATRIX = Path(__file__).with_name("matrix.py")
CHOSEN = ("finetune", "experts", "sparsify", "precompute", "prepare_benchmark", "pages")
"""Scenarios that start quickly; perf/kill_matrix.py kills the others too."""
KILLS = 20


def seed() -> str:
    """The commit, so that every one tries other moments; a fixed seed without git."""
    if given := os.environ.get("KILL_SEED"):
        return given
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=MATRIX.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "0"


@pytest.mark.slow
def test_killed_anywhere_the_same_command_gives_the_same_bytes():
    command = [sys.executable, str(MATRIX), "--kills", str(KILLS), "--seed", seed(), "--scenarios", ",".join(CHOSEN)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    # a moment of the clock may come too late
    assert result["kills"] >= KILLS * 0.7, result
    for case in result["cases"]:
        found = {what: case[what] for what in ("half_written", "different", "left_over", "failed")}
        assert not any(found.values()), case
