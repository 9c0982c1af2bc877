"""Each row of the parity ledger names tests that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from ledger import PAGES, entries
from project_fixtures import REPOSITORY

TESTS = REPOSITORY / "tests"
NOT_PINNED = "–"
"""For rows about what does not exist here, so that nothing can be run."""

NAME = re.compile(r"`((?:\w+/)?(?:test_)?[\w*…]+(?:\.py)?/?)`")


def rows(text: str) -> Iterator[tuple[str, str, str]]:
    """Of the entries that state what is done ``here``: the term, what mmpipe does, and the tests, "same" replaced by
    the tests of the entry before."""
    before = heading = ""
    for entry in entries(text):
        if entry.heading != heading:
            before, heading = "", entry.heading
        if "here" not in entry.facts:
            continue
        pinned = entry.facts.get("pinned by", "")
        if re.match(r"same\b", pinned):
            assert before.strip(NOT_PINNED), f"'same' repeats nothing: {entry.term}"
            pinned = before + pinned.removeprefix("same")
        before = pinned
        yield entry.term, entry.facts.get("here", ""), pinned


def known() -> tuple[set[str], set[str]]:
    """The test files below ``tests``, and the functions in them."""
    files = {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    functions = {name for file in files for name in re.findall(r"^def (test_\w+)", (TESTS / file).read_text(), re.M)}
    return files, functions


def fault(pinned_by: str, files: set[str], functions: set[str]) -> str | None:
    """What is wrong with a cell; ``…`` and ``*`` stand for any text."""
    if pinned_by == NOT_PINNED:
        return None
    named = NAME.findall(pinned_by)
    if not named:
        return "names no test"
    for name in named:
        among = files if name.endswith(".py") else functions
        if not any(fnmatchcase(there, name.replace("…", "*")) for there in among):
            return f"'{name}' is no test file and no test function"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_row_of_the_ledger_is_pinned(page: Path) -> None:
    files, functions = known()
    faults = [
        f"{about}: {found}" for about, _, cell in rows(page.read_text()) if (found := fault(cell, files, functions))
    ]
    assert not faults


def test_the_ledger_has_its_rows() -> None:
    found = [row for page in PAGES for row in rows(page.read_text())]
    assert len(found) > 90, "is the ledger written in another way?"
    assert sum(cell == NOT_PINNED for *_, cell in found) <= 3, (
        "a row without a test is about something that does not exist"
    )


@pytest.mark.parametrize(
    "cell", ["", "`config/recipes/`", "`parity/`", "`test_gone`", "`unit/test_gone.py`", "the code"]
)
def test_a_cell_that_pins_nothing_is_refused(cell: str) -> None:
    assert fault(cell, *known())


@pytest.mark.parametrize("first", ["same", "–\n* b\n  * here: c\n  * pinned by: same"])
def test_same_must_repeat_something(first: str) -> None:
    with pytest.raises(AssertionError, match="repeats nothing"):
        list(rows(f"# head\n\n* a\n  * here: b\n  * pinned by: {first}\n"))
