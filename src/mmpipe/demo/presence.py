"""Synthetic data about the presence of objects: conversations, preference pairs, and a benchmark like POPE.

Instruction data mostly asks about objects that are present (so models learn to agree); preference pairs ask about
present and absent objects equally often, and the chosen answer is the true one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import write_jsonl
from mmpipe.data.images import encode_image
from mmpipe.demo.datasets import entry
from mmpipe.demo.scenes import COLORS, SHAPES, SHORT_ANSWER, Scene, scenes

POPE_CATEGORIES = ("random", "popular", "adversarial")


def presence(out: Path, *, seed: int, records: int = 800, present: float = 0.75) -> None:
    """Conversations about whether an object is present, laid out as LLaVA's instruction data; in a share ``present`` of
    the questions it is."""
    rng = random.Random(seed)
    (out / "images").mkdir(parents=True)
    entries = []
    for number, scene in enumerate(islice(scenes(rng.getrandbits(32)), records)):
        name = f"images/{number:06d}.jpg"
        (out / name).write_bytes(_jpeg(scene))
        question, answer = yes_no(scene, rng.random() < present, rng)
        entries.append(entry(f"{number:06d}", name, [(f"<image>\n{question}\n{SHORT_ANSWER}", answer)]))
    (out / "presence.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")


def preferences(out: Path, *, seed: int, pairs: int = 600, shards: int = 2) -> None:
    """Preference pairs laid out as RLAIF-V: Parquet with the images inside."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(seed)
    rows = [_pair(number, scene, rng) for number, scene in enumerate(islice(scenes(rng.getrandbits(32)), pairs))]
    for shard in range(shards):
        table = pa.Table.from_pylist(rows[shard::shards])
        pq.write_table(table, out / f"RLAIF-V-Dataset_{shard:03d}.parquet")


def pope(out: Path, *, seed: int, questions: int = 100) -> None:
    """Yes-or-no questions about objects in held-out images, laid out as POPE on COCO: ``questions`` for each of the
    three kinds (another color, another shape, another color of the same shape)."""
    rng = random.Random(seed)
    drawn = list(islice(scenes(rng.getrandbits(32), held_out=True), questions // 2))
    (out / "val2014").mkdir(parents=True)
    (out / "coco").mkdir()
    for number, scene in enumerate(drawn):
        (out / "val2014" / _file_name(number)).write_bytes(_jpeg(scene))
    for category in POPE_CATEGORIES:
        lines = _pope_lines(category, drawn, rng)
        write_jsonl(out / "coco" / f"coco_pope_{category}.json", lines)


def yes_no(scene: Scene, true: bool, rng: random.Random) -> tuple[str, str]:
    """A question about an object and its right answer, as POPE asks it."""
    thing = _present(scene) if true else _absent(scene, rng)
    return f"Is there a {thing} in the image?", "Yes" if true else "No"


def _pair(number: int, scene: Scene, rng: random.Random) -> dict[str, Any]:
    question, answer = yes_no(scene, rng.random() < 0.5, rng)
    other = "No" if answer == "Yes" else "Yes"
    return {
        "ds_name": "made",
        "image": {"bytes": _jpeg(scene), "path": f"{number:06d}.jpg"},
        "question": f"{question}\n{SHORT_ANSWER}",
        "chosen": answer,
        "rejected": other,
        "origin_dataset": "made",
        "idx": str(number),
    }


def _pope_lines(category: str, drawn: list[Scene], rng: random.Random) -> Iterator[dict[str, Any]]:
    for number, scene in enumerate(drawn):
        absent = {
            "random": lambda scene=scene: _absent(scene, rng),
            "popular": lambda scene=scene: f"{scene.color} {_other(SHAPES, scene.shape, rng)}",
            "adversarial": lambda scene=scene: f"{_other(tuple(COLORS), scene.color, rng)} {scene.shape}",
        }[category]
        for offset, (thing, label) in enumerate(((_present(scene), "yes"), (absent(), "no"))):
            yield {
                "question_id": 2 * number + offset + 1,
                "image": _file_name(number),
                "text": f"Is there a {thing} in the image?",
                "label": label,
            }


def _present(scene: Scene) -> str:
    return f"{scene.color} {scene.shape}"


def _absent(scene: Scene, rng: random.Random) -> str:
    return f"{_other(tuple(COLORS), scene.color, rng)} {_other(SHAPES, scene.shape, rng)}"


def _other(values: tuple[str, ...], value: str, rng: random.Random) -> str:
    return rng.choice([candidate for candidate in values if candidate != value])


def _file_name(number: int) -> str:
    return f"COCO_val2014_{number:012d}.jpg"


def _jpeg(scene: Scene) -> bytes:
    return encode_image(scene.draw(), "JPEG", quality=95)
