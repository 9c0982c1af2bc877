"""What the report shows of one stage: its curves and its identity card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mmpipe.artifacts.files import read_json, read_jsonl
from mmpipe.losses import COLLAPSE_ALARM
from mmpipe.plotting import COLOURS, figure
from mmpipe.report.page import write_page

_NOT_LOSSES = {"step", "tokens", "loss", "learning_rate", "grad_norm", "records_replaced"}
_ROUTING, _COLLAPSE = "routing.", ".top_set"
_ROUTING_PANELS = {".load": "busiest expert's share", _COLLAPSE: "most common choice, worst layer"}
_MOST_POINTS = 2000


def draw_history(history: Path, out: Path) -> None:
    """Draw loss terms, learning rate, gradient norm and, of a sparse model, how its experts are used over the steps, as
    SVG."""
    rows = _thinned(read_jsonl(history))
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
                values = [row.get(name) for row in rows]
                if len(rows) == 1:
                    axis.plot(steps, values, "o", color=colour, label=_label(name))
                else:
                    axis.plot(steps, values, color=colour, linewidth=1, label=_label(name))
            axis.set_xlabel("step")
            axis.set_title(title)
            if len(names) > 1:
                axis.legend()
            if title == _ROUTING_PANELS[_COLLAPSE]:
                axis.axhline(COLLAPSE_ALARM, color="grey", linestyle=":", linewidth=1)
                axis.set_ylim(0, 1.03)


def _label(name: str) -> str:
    """``vision tower`` for ``routing.vision_tower.load``, the name itself for a loss."""
    return name.split(".")[1].replace("_", " ") if name.startswith(_ROUTING) else name


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every n-th row, so that long histories stay drawable."""
    stride = -(-len(rows) // _MOST_POINTS)
    return rows[:: max(1, stride)]


def settings_page(manifest: Path, page: Path) -> None:
    """Lay out a checkpoint's manifest."""
    card = read_json(manifest)
    shown = ("steps", "tokens_seen", "records_replaced", "seed", "mmpipe")
    facts = [(name.replace("_", " "), card[name]) for name in shown if name in card]
    facts += sorted(card["libraries"].items())
    write_page(
        page,
        "settings.html",
        title=f"{card['recipe']}: {card['stage']}",
        settings=yaml.safe_dump(card["spec"], sort_keys=False, allow_unicode=True),
        facts=facts,
        inputs=card["inputs"].items(),
        files=card["files"].items(),
    )
