"""Demo files in a small size, and jobs on them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from made_tokens import TINY, write_tokens

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import read_json, sha256, write_json
from mmpipe.models.settings import VisionLanguage
from mmpipe.stages.base import StageJob


def make_one_sided(path: Path) -> None:
    """Let every pair prefer "Yes": even a model that sees nothing can learn that."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    for column, answer in (("chosen", "Yes"), ("rejected", "No")):
        place = table.column_names.index(column)
        table = table.set_column(place, column, [[answer] * len(table)])
    pq.write_table(table, path)


def make_demo_files(root: Path) -> Path:
    """A working directory with tiny backbones, a data set and a mixture, laid out as the rules lay them out."""
    from mmpipe.artifacts import manifest
    from mmpipe.data.mixture import build_mixture
    from mmpipe.data.spec import MixtureSourceSpec, MixtureSpec
    from mmpipe.demo.backbones import clip_tiny, qwen2_tiny
    from mmpipe.demo.datasets import conversations
    from mmpipe.demo.presence import preferences

    backbones = root / "resources/backbones"
    for name, make in {
        "clip-tiny": lambda out: clip_tiny(out, hidden_size=32, layers=2, training_steps=2),
        "qwen2-tiny": lambda out: qwen2_tiny(out, hidden_size=32, layers=2),
    }.items():
        (backbones / name).mkdir(parents=True)
        make(backbones / name)
        manifest.write(backbones / name, kind="source", spec="{}", inputs={})
    shapes = root / "resources/datasets/shapes"
    conversations(shapes, seed=5, records=60)
    manifest.write(shapes, kind="source", spec="{}", inputs={})
    pairs = root / "resources/datasets/pairs"
    pairs.mkdir(parents=True)
    preferences(pairs, seed=5, pairs=24, shards=1)
    make_one_sided(pairs / "RLAIF-V-Dataset_000.parquet")
    manifest.write(pairs, kind="source", spec="{}", inputs={})
    parts = {
        "mix": MixtureSourceSpec(dataset="shapes", annotations="llava_v1_5_mix665k.json", images="."),
        "pairs": MixtureSourceSpec(dataset="pairs", annotations="*.parquet", format="rlaif_v"),
    }
    here = Path.cwd()
    os.chdir(root)  # records name images relative to the working directory
    try:
        for name, part in parts.items():
            out = Path("resources/mixtures", name)
            datasets = {part.dataset: Path("resources/datasets", part.dataset)}
            build_mixture(MixtureSpec(parts=[part]), datasets, out, log=lambda line: None, published=out)
            manifest.write(out, kind="mixture", spec="{}", inputs={})
            write_tokens(out, Path("resources/tokens", name), TINY)
    finally:
        os.chdir(here)
    return root


def half_without_images(job: StageJob, out: Path) -> StageJob:
    """The job on a mixture whose every second record is text alone."""
    from mmpipe.data.record_table import RecordTable, write_records

    records = [
        replace(
            record,
            images=(),
            turns=tuple(replace(turn, text=turn.text.replace("<image>", "")) for turn in record.turns),
        )
        if number % 2
        else record
        for number, record in enumerate(RecordTable(Path("resources/mixtures/mix/records.arrow")))
    ]
    write_records(out / "records.arrow", records)
    return replace(job, tokens=write_tokens(out, out / "tokens", TINY))


def make_job(folder: Path, name: str = "run", **changes: Any) -> StageJob:
    """A job in the current directory that publishes below ``folder``."""
    backbones = {role: Path("resources/backbones", f"{role}-tiny") for role in ("clip", "qwen2")}
    facts: dict[str, Any] = {
        "recipe": "test",
        "stage": name,
        "spec": json.dumps({"stage": "finetune", "model": {"vision": "clip-tiny", "language": "qwen2-tiny"}}),
        "model_dir": folder / name / "model",
        "state_dir": folder / name / "state",
        "report_dir": folder / name / "report",
        "vision_language": VisionLanguage(vision="clip-tiny", language="qwen2-tiny"),
        "backbones": {"vision": backbones["clip"], "language": backbones["qwen2"]},
        "parent": None,
        "tokens": Path("resources/tokens/mix"),
        "manifests": tuple(path / "manifest.json" for path in backbones.values()),
    }
    return StageJob(**{**facts, **changes})


def list_anew(artifact: Path) -> None:
    """Let the manifest of an artifact that a test has changed list its files as they are."""
    card = read_json(artifact / manifest.NAME)
    card["files"] = {
        name: {"size": (artifact / name).stat().st_size, "sha256": sha256(artifact / name)} for name in card["files"]
    }
    write_json(artifact / manifest.NAME, card)
