"""Counts of records by outcome, with a few examples each."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import write_json
from mmpipe.errors import DataError

Log = Callable[[str], None]
EXAMPLES = 10
"""Number of examples per reason; the log names all records."""


@dataclass
class ReasonCounts:
    """The count of each reason, with the first examples."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, example: str) -> None:
        """Count ``what``, of which ``example`` is one."""
        self.counts[what] += 1
        examples = self.examples.setdefault(what, [])
        if len(examples) < EXAMPLES:
            examples.append(example)

    def update(self, later: ReasonCounts) -> None:
        """Add later counts."""
        self.counts += later.counts
        for what, examples in later.examples.items():
            own = self.examples.setdefault(what, [])
            own += examples[: EXAMPLES - len(own)]

    def lines(self) -> Iterator[str]:
        """Each reason with its count and one example, the most frequent first."""
        for what, facts in self.report().items():
            yield f"{what}: {facts['count']}, e.g. {facts['examples'][0]}"

    def total(self) -> int:
        """The sum of all counts."""
        return self.counts.total()

    def report(self) -> dict[str, Any]:
        """Counts and examples by reason, the most frequent first."""
        return {
            what: {"count": count, "examples": self.examples[what]}
            for what, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        }


class Throughput:
    """Records per second of processor time, for logs: of this process and its finished children."""

    def __init__(self) -> None:
        self._start = sum(os.times()[:4])

    def __call__(self, records: int) -> str:
        seconds = sum(os.times()[:4]) - self._start
        return f"{records / max(seconds, 1e-9):,.0f} records per core-second"


def or_raise_max_bad(advice: Sequence[str], kept: int, max_bad: float) -> str:
    """Ways out of too many bad records, in a line; raising ``max_bad`` is one where it helps."""
    ways = [*advice, *(["raise max_bad of the mixture"] if kept and max_bad < 1 else [])]
    return ", ".join(ways[:-1]) + (", or " if len(ways) > 1 else "") + ways[-1]


@contextmanager
def keeping(report: dict[str, Any], failed: Path | None) -> Iterator[None]:
    """Write the report to ``failed`` and name it when the block raises DataError; an older one is removed."""
    if failed is None:
        yield
        return
    failed.unlink(missing_ok=True)
    try:
        yield
    except DataError as error:
        write_json(failed, report)
        raise DataError(f"{error}\n{failed} counts all of them") from None


def up_to(value: int) -> int:
    """The bound of a value in a histogram: the next power of two."""
    return 1 << (value - 1).bit_length() if value > 0 else 0


def histogram(counts: Counter[int]) -> dict[str, int]:
    """Counts by upper bound, in order."""
    return {str(bound): counts[bound] for bound in sorted(counts)}
