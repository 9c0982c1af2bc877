"""What the ledger says it is pinned by is there."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from project_fixtures import REPOSITORY

TESTS = REPOSITORY / "tests"


def test_every_test_of_the_ledger_exists() -> None:
    """Files below ``tests`` and functions; ``…`` and ``*`` stand for any text."""
    ledger = (REPOSITORY / "docs/parity.md").read_text()
    named = set(re.findall(r"`((?:\w+/)?test_[\w*…]+(?:\.py)?)`", ledger))
    files = {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    functions = {name for file in files for name in re.findall(r"^def (test_\w+)", (TESTS / file).read_text(), re.M)}
    assert len(named) > 50, "is the ledger written in another way?"
    lost = [
        name
        for name in sorted(named)
        if not any(
            fnmatchcase(there, name.replace("…", "*")) for there in (files if name.endswith(".py") else functions)
        )
    ]
    assert not lost
