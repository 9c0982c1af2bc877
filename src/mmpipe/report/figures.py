"""Figures of the HTML report, as SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import read_jsonl, read_report
from mmpipe.losses import COLLAPSE_ALARM
from mmpipe.plotting import COLOURS, figure

_NOT_LOSSES = {"step", "tokens", "loss", "learning_rate", "grad_norm", "records_replaced"}
_ROUTING, _COLLAPSE = "routing.", ".top_set"
_ROUTING_PANELS = {".load": "busiest expert's share", _COLLAPSE: "most common choice, worst layer"}
_MOST_POINTS = 2000

_EFFICIENCY = {
    "paper_flops": "operations, paper's formula",
    "prompt_flops": "operations, prompt",
    "prompt_seconds": "time, prompt",
    "first_token_seconds": "time to the first token",
    "token_seconds": "time, further token",
    "cache_bytes": "cache",
    "peak_bytes": "peak memory",
}
"""Measures that are drawn, and their labels."""


def draw_history(history: Path, out: Path) -> None:
    """Draw loss terms, learning rate, gradient norm and, of a mixture of experts, expert load over the steps.

    Of a long history every n-th step is drawn.
    """
    rows = read_jsonl(history)
    rows = rows[:: max(1, -(-len(rows) // _MOST_POINTS))]
    steps = [row["step"] for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    terms = [name for name in names if name not in _NOT_LOSSES and not name.startswith(_ROUTING)]
    panels = [
        ("loss", ["loss", *(t for t in terms if len(terms) > 1)]),
        ("learning rate", ["learning_rate"]),
        ("grad norm", ["grad_norm"]),
        *(
            (title, measured)
            for ending, title in _ROUTING_PANELS.items()
            if (measured := [n for n in names if n.startswith(_ROUTING) and n.endswith(ending)])
        ),
    ]
    with figure(out, 1, len(panels), (3.7 * len(panels), 3.2)) as axes:
        for axis, (title, names) in zip(axes.flat, panels, strict=True):
            for name, colour in zip(names, COLOURS, strict=False):
                look: Any = {"marker": "o", "linestyle": ""} if len(rows) == 1 else {"linewidth": 1}
                label = name.split(".")[1].replace("_", " ") if name.startswith(_ROUTING) else name
                axis.plot(steps, [row.get(name) for row in rows], color=colour, label=label, **look)
            axis.set_xlabel("step")
            axis.set_title(title)
            if len(names) > 1:
                axis.legend()
            if title == _ROUTING_PANELS[_COLLAPSE]:
                axis.axhline(COLLAPSE_ALARM, color="grey", linestyle=":", linewidth=1)
                axis.set_ylim(0, 1.03)


def draw_efficiency(measured: Path, out: Path) -> None:
    """Draw dense over sparse by measure and keep rate, a panel for each batch size; points without a gain are hollow."""
    rows = read_report(measured)["rows"]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    with figure(out, 1, len(batches), (4.4 * len(batches), 3.6)) as axes:
        for axis, size in zip(axes.flat, batches, strict=True):
            for measure, label in _EFFICIENCY.items():
                points = [
                    row
                    for row in rows
                    if (row["batch"], row["measure"]) == (size, measure) and row["ratio"] is not None
                ]
                paper = measure == "paper_flops"
                (line,) = axis.plot(
                    [f"{row['keep']:g}" for row in points],
                    [row["ratio"] for row in points],
                    "--" if paper else "-",
                    linewidth=1,
                    label=label,
                    color="grey" if paper else None,
                )
                for row in points:
                    face = line.get_color() if row["gain"] else "white"
                    place = f"{row['keep']:g}", row["ratio"]
                    axis.plot(*place, "o", markersize=4, color=line.get_color(), markerfacecolor=face)
            axis.axhline(1, color="grey", linestyle=":", linewidth=1)
            axis.set_title(f"batch of {size}")
            axis.set_xlabel("share of an image's tokens that is kept")
            axis.set_ylabel("times less than dense")
            axis.set_ylim(bottom=0)
        axes.flat[0].legend(fontsize=7, title="hollow: no gain", title_fontsize=7)
