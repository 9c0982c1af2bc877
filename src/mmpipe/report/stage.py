"""What the report shows of one stage: its curves and its identity card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mmpipe.artifacts.files import read_json, read_jsonl
from mmpipe.report.page import write_page

_NOT_LOSSES = {"step", "tokens", "loss", "learning_rate", "grad_norm"}
_ROUTING = "routing."
_MOST_POINTS = 2000
# Okabe and Ito's colours, told apart by colour-blind readers too
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw_history(history: Path, figure: Path) -> None:
    """Draw loss terms, learning rate and gradient norm over the steps, as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    rows = _thinned(read_jsonl(history))
    steps = [row["step"] for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    terms = [name for name in names if name not in _NOT_LOSSES and not name.startswith(_ROUTING)]
    loads = [name for name in names if name.startswith(_ROUTING) and name.endswith(".load")]
    # fixed ids and no date: the same history draws the same bytes
    with mpl.rc_context(
        {"svg.hashsalt": "mmpipe", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        columns = 4 if loads else 3
        canvas, axes = plt.subplots(1, columns, figsize=(11 * columns / 3, 3.2), layout="constrained")
        panels = [
            (axes[0], ["loss", *(t for t in terms if len(terms) > 1)]),
            (axes[1], ["learning_rate"]),
            (axes[2], ["grad_norm"]),
        ]
        if loads:
            panels.append((axes[3], loads))
        for axis, names in panels:
            for name, colour in zip(names, _COLOURS, strict=False):
                values = [row.get(name) for row in rows]
                if len(rows) == 1:
                    axis.plot(steps, values, "o", color=colour, label=_label(name))
                else:
                    axis.plot(steps, values, color=colour, linewidth=1, label=_label(name))
            axis.set_xlabel("step")
            title = "busiest expert's share" if names is loads else names[0].replace("_", " ")
            axis.set_title(title, loc="left")
            if len(names) > 1:
                axis.legend(frameon=False)
        figure.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(figure, format="svg", metadata={"Date": None})
        plt.close(canvas)


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
    shown = ("steps", "tokens_seen", "seed", "mmpipe")
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
