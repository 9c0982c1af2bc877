"""The findings of ``mmpipe doctor``, in the terminal or as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from mmpipe.doctor.base import Finding
from mmpipe.escapes import json_text, markup

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def print_findings(findings: Sequence[Finding]) -> None:
    """Print one line a finding: status, topic, what was found, advice."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        advice = f"\n[dim]→ {markup(finding.advice)}[/]" if finding.advice else ""
        table.add_row(
            f"[{_COLOURS[finding.status]}]{finding.status}[/]", markup(finding.topic), markup(finding.seen) + advice
        )
    console = Console()
    console.print(table)
    counts = Counter(finding.status for finding in findings)
    console.print(f"\n{counts['problem']} problem(s), {counts['warning']} warning(s), {counts['ok']} ok")


def as_json(findings: Sequence[Finding]) -> str:
    """The findings as JSON."""
    return json_text([asdict(finding) for finding in findings])
