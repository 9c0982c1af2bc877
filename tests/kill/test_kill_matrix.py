"""Whatever moment a training or an evaluation is killed at, the same command ends with the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MATRIX = Path(__file__).with_name("matrix.py")


@pytest.mark.slow
def test_killed_anywhere_the_same_command_gives_the_same_bytes():
    """One kill at each kind of moment and a torn file, two before each run to the end."""
    command = [sys.executable, str(MATRIX), "--kills", "7", "--seed", os.environ.get("KILL_SEED", "0")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] >= 6, result
    for case in result["cases"]:
        found = {what: case[what] for what in ("half_written", "different", "left_over", "failed")}
        assert not any(found.values()), case
