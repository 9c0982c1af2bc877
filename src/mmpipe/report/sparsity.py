"""What the report shows of a sparsified checkpoint: what it saves, and what it keeps of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpipe.artifacts.files import read_json
from mmpipe.data.images import data_url
from mmpipe.plotting import figure
from mmpipe.report.page import write_page

if TYPE_CHECKING:
    from PIL import Image

TITLES = {
    "paper_flops": "operations over the images' tokens, by the paper's formula",
    "prompt_flops": "operations of the language model over the prompt, counted",
    "image_flops": "operations of vision tower and projector, counted",
    "token_flops": "operations of a generated token, counted",
    "image_seconds": "time of vision tower and projector",
    "prompt_seconds": "time of the language model over the prompt",
    "first_token_seconds": "both: time to the first token",
    "token_seconds": "time of each further token",
    "predicted_cache_bytes": "cache behind the prompt, predicted",
    "cache_bytes": "cache behind the prompt, measured",
    "answered_cache_bytes": "cache behind the answer, measured",
    "peak_bytes": "peak memory, weights included",
}
DRAWN = {
    "paper_flops": "operations, paper's formula",
    "prompt_flops": "operations, prompt",
    "prompt_seconds": "time, prompt",
    "first_token_seconds": "time to the first token",
    "token_seconds": "time, further token",
    "cache_bytes": "cache",
    "peak_bytes": "peak memory",
}
TOWER = {"image_flops", "image_seconds"}
"""What no keep rate changes."""

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "µ"))
_WIDTH = 192

Row = dict[str, Any]


def in_units(value: float, unit: str) -> str:
    """Three digits and a prefix.

    >>> in_units(0.00234, "s"), in_units(1.5e9, "B"), in_units(0, "B")
    ('2.34 ms', '1.50 GB', '0 B')
    """
    for size, prefix in _PREFIXES:
        if value >= size:
            scaled = value / size
            digits = max(0, 2 - len(str(int(scaled))) + 1)
            return f"{scaled:.{digits}f} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def efficiency_page(measured: Path, page: Path) -> None:
    """Lay out ``measured.json`` as a table for each batch size; where nothing is saved it says so."""
    content = read_json(measured)
    rows = content["rows"]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    keeps = list(dict.fromkeys(row["keep"] for row in rows))
    write_page(
        page,
        "efficiency.html",
        title=f"What {content['checkpoint']} saves",
        content=content,
        weights=in_units(content["weights_bytes"], "B"),
        keeps=keeps,
        tables=[(size, _table([row for row in rows if row["batch"] == size], keeps)) for size in batches],
    )


def _table(rows: Sequence[Row], keeps: Sequence[float | None]) -> list[tuple[str, list[Row]]]:
    """Title and cells of every measure."""
    at = {(row["measure"], row["keep"]): row for row in rows}
    return [
        (title, [_cell(at[measure, keep]) for keep in (keeps[:1] if measure in TOWER else keeps)])
        for measure, title in TITLES.items()
    ]


def _cell(row: Row) -> Row:
    """The texts of one number: its value, its range, and what it is beside the dense model."""
    if row["value"] is None:
        return {"value": "–", "range": "", "ratio": None, "gain": None}
    low, high = (in_units(row[end], row["unit"]) for end in ("low", "high"))
    return {
        "value": in_units(row["value"], row["unit"]),
        "range": f"{low} to {high}" if row["repeats"] > 1 else "",
        "ratio": None if row["ratio"] is None else f"{row['ratio']:.2f}",
        "gain": row["gain"],
    }


def draw_efficiency(measured: Path, out: Path) -> None:
    """Draw how many times less each keep rate needs than the dense model, a panel a batch size. What is no gain is hollow."""
    rows = read_json(measured)["rows"]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    with figure(out, 1, len(batches), (4.4 * len(batches), 3.6)) as axes:
        for axis, size in zip(axes.flat, batches, strict=True):
            for measure, label in DRAWN.items():
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


# ---- maps


def keep_maps_page(
    title: str, maps: Sequence[Row], images: Sequence[Image.Image], places: tuple[int, int] | None, page: Path
) -> None:
    """Show what is kept of each image: ``maps`` of :mod:`mmpipe.analysis.retention_maps`, ``images`` in
    the same order, ``places`` as its ``grid`` tells them."""
    shown = [
        {
            "question_id": row["question_id"],
            "prompt": row["prompt"],
            "image": data_url(_enlarged(image), "JPEG", quality=88),
            "kept": [
                {
                    "rate": rate,
                    "count": tokens.count("1"),
                    "of": len(tokens),
                    "image": data_url(covered(image, tokens, places), "JPEG", quality=88) if places else None,
                }
                for rate, tokens in row["kept"].items()
            ],
        }
        for row, image in zip(maps, images, strict=True)
    ]
    write_page(page, "kept.html", title=title, maps=shown)


def covered(image: Image.Image, tokens: str, places: tuple[int, int]) -> Image.Image:
    """The image, pale where its ``tokens`` (0 and 1) are dropped."""
    from PIL import Image

    lead, side = places
    large = _enlarged(image)
    grey = large.convert("L").convert("RGB")
    pale = Image.blend(grey, Image.new("RGB", large.size, "white"), 0.8)
    mask = Image.frombytes("L", (side, side), bytes(255 * int(token) for token in tokens[lead:]))
    return Image.composite(large, pale, mask.resize(large.size, Image.Resampling.NEAREST))


def _enlarged(image: Image.Image) -> Image.Image:
    from PIL import Image

    how = Image.Resampling.NEAREST if image.width < _WIDTH else Image.Resampling.BICUBIC
    return image.convert("RGB").resize((_WIDTH, _WIDTH * image.height // image.width), how)
