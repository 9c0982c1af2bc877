"""Reading the parity ledger: entries ``* term`` with facts ``  * key: value`` below them, under headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from project_fixtures import REPOSITORY

PAGES = sorted((REPOSITORY / "docs/parity").glob("*.md"))


@dataclass
class Entry:
    heading: str
    term: str
    facts: dict[str, str] = field(default_factory=dict)


def entries(text: str) -> Iterator[Entry]:
    """The entries of a page. An entry ``1. key: value`` has its number for a term."""
    heading, entry, lines = "", None, []
    for line in [*text.splitlines(), "# end"]:
        if lines and re.match(r" +\S", line) and not re.match(r" *(\*|\d+\.) ", line):
            lines[-1] += " " + line.strip()
            continue
        if not line.startswith(" "):
            if entry:
                yield _filled(entry, lines)
            entry, lines = None, []
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif numbered := re.match(r"(\d+)\. (.*)", line):
            entry, lines = Entry(heading, numbered[1]), ["", numbered[2]]
        elif line.startswith("* "):
            entry, lines = Entry(heading, ""), [line[2:]]
        elif entry and line.lstrip().startswith("* "):
            lines.append(line.lstrip()[2:])


def _filled(entry: Entry, lines: list[str]) -> Entry:
    entry.term = entry.term or lines[0].strip("*")
    for line in lines[1:]:
        key, _, value = line.partition(": ")
        entry.facts[key.strip("`")] = value
    return entry
