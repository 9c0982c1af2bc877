"""Small self-contained HTML pages. All text is escaped: answers of models are untrusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from mmpipe.analysis.base import Row
from mmpipe.artifacts.files import read_jsonl, read_report, write_text
from mmpipe.artifacts.manifest import load
from mmpipe.benchmarks.prepare import evenly, read_questions
from mmpipe.data.images import data_url
from mmpipe.escapes import printable

SAMPLES = 24
"""Questions on a page of samples."""
_LONGEST = 600
_WIDTH = 192
"""Width of an enlarged image in pixels."""
_TABLES = {
    "comparison": "{content[title]}",
    "leaderboard": "All benchmarks",
    "mixture": "Data of {source.parent.name}",
    "tokens": "Tokens of {source.parent.parent.name}",
    "contamination": "Contamination of {source.stem}",
}
"""Titles of the pages that show one JSON file."""
MEASURES = {
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
"""Measures of the efficiency page, and their titles."""
_TOWER = {"image_flops", "image_seconds"}
"""Measures that do not depend on the keep rate."""
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "µ"))


_TEMPLATES = Environment(
    loader=PackageLoader("mmpipe.report"),
    autoescape=True,
    # a value's control characters and bidirectional overrides are visible in a page too
    finalize=lambda value: printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(path: Path, template: str, **content: Any) -> None:
    """Fill ``templates/{template}.html`` and write it."""
    write_text(path, _TEMPLATES.get_template(f"{template}.html").render(**content))


def table_page(template: str, source: Path, page: Path) -> None:
    """Lay out the JSON file ``source`` as tables; ``template`` is one of ``comparison``, ``leaderboard``, ``mixture``,
    ``tokens`` and ``contamination``."""
    content = read_report(source)
    write_page(page, template, title=_TABLES[template].format(content=content, source=source), content=content)


def settings_page(manifest: Path, page: Path) -> None:
    """Lay out a checkpoint's manifest."""
    card = load(manifest)
    shown = ("steps", "tokens_seen", "records_replaced", "seed", "mmpipe")
    facts = [(name.replace("_", " "), card[name]) for name in shown if name in card]
    write_page(
        page,
        "settings",
        title=": ".join(card[key] for key in ("recipe", "stage") if key in card),
        settings=yaml.safe_dump(card["spec"], sort_keys=False, allow_unicode=True),
        facts=facts + sorted(card.get("libraries", {}).items()),
        inputs=card["inputs"].items(),
        files=card["files"].items(),
    )


def samples_page(prepared: Path, answers: Path, per_item: Path, page: Path, shown: int = SAMPLES) -> None:
    """Show ``shown`` questions spread evenly over a benchmark, with their images, answers and verdicts.

    Questions, answers and verdicts are in the same order (gathering proves it).
    """
    rows = list(zip(read_questions(prepared), read_jsonl(answers), read_jsonl(per_item), strict=True))
    samples = [
        {
            "id": question.id,
            "images": [data_url(path) for path in question.images if isinstance(path, Path)],
            "prompt": answer["prompt"][:_LONGEST],
            "text": answer["text"][:_LONGEST],
            "parsed": verdict["parsed"],
            "correct": verdict["correct"],
            "gold": verdict.get("gold"),
        }
        for question, answer, verdict in evenly(rows, shown)
    ]
    title = f"Answers of {answers.parts[-4]} to {prepared.name}"
    write_page(page, "samples", title=title, samples=samples, total=len(rows))


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
    """Lay out ``measured.json``, a table for each batch size: value, range, and the gain over dense, if any."""
    content = read_report(measured)
    cells = {(row["batch"], row["measure"], row["keep"]): _cell(row) for row in content["rows"]}
    keeps = list(dict.fromkeys(keep for _, _, keep in cells))

    def table(batch: int) -> list[tuple[str, list[Row]]]:
        return [
            (title, [cells[batch, measure, keep] for keep in (keeps[:1] if measure in _TOWER else keeps)])
            for measure, title in MEASURES.items()
        ]

    write_page(
        page,
        "efficiency",
        title=f"Efficiency of {content['checkpoint']}",
        content=content,
        weights=in_units(content["weights_bytes"], "B"),
        keeps=keeps,
        tables=[(batch, table(batch)) for batch in dict.fromkeys(batch for batch, _, _ in cells)],
    )


def _cell(row: Row) -> Row:
    """Value, range, and dense over sparse as texts."""
    if row["value"] is None:
        return {"value": "–", "range": "", "ratio": None, "gain": None}
    value, low, high = (in_units(row[key], row["unit"]) for key in ("value", "low", "high"))
    return {
        "value": value,
        "range": f"{low} to {high}" if row["repeats"] > 1 else "",
        "ratio": None if row["ratio"] is None else f"{row['ratio']:.2f}",
        "gain": row["gain"],
    }


def retention_maps_page(
    title: str, maps: Sequence[Row], images: Sequence[Image.Image], places: tuple[int, int] | None, page: Path
) -> None:
    """Show the retained tokens of each image.

    ``maps`` and ``places`` are the results of :func:`mmpipe.analysis.retention_maps.retention_maps` and its ``grid``; ``images``
    has the order of ``maps``.
    """
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
    write_page(page, "retention", title=title, maps=shown)


def covered(image: Image.Image, tokens: str, places: tuple[int, int]) -> Image.Image:
    """The image, pale where its ``tokens`` (0 and 1) are dropped."""
    lead, side = places
    large = _enlarged(image)
    pale = Image.blend(large.convert("L").convert("RGB"), Image.new("RGB", large.size, "white"), 0.8)
    mask = Image.frombytes("L", (side, side), bytes(255 * int(token) for token in tokens[lead:]))
    return Image.composite(large, pale, mask.resize(large.size, Image.Resampling.NEAREST))


def _enlarged(image: Image.Image) -> Image.Image:
    how = Image.Resampling.NEAREST if image.width < _WIDTH else Image.Resampling.BICUBIC
    return image.convert("RGB").resize((_WIDTH, _WIDTH * image.height // image.width), how)
