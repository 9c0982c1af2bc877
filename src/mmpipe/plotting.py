"""The style of all figures, as SVG: equal numbers give equal bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, distinct for colour-blind readers too."""


@contextmanager
def figure(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """An array ``[rows, columns]`` of axes, written to ``path`` when the block ends; ``size`` in inches."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt
    from cycler import cycler

    look: Any = {
        # fixed ids and no date
        "svg.hashsalt": "mmpipe",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=COLOURS),
        "legend.frameon": False,
        "axes.titlelocation": "left",
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with mpl.rc_context(look):
        canvas, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        try:
            yield axes
            path.parent.mkdir(parents=True, exist_ok=True)
            # the name only when it is whole; this module is below artifacts.files
            canvas.savefig(temporary, format="svg", metadata={"Date": None})
            os.replace(temporary, path)
        finally:
            plt.close(canvas)
            temporary.unlink(missing_ok=True)
