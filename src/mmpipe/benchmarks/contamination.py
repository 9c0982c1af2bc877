"""Contamination: benchmark images that are in training data.

Files are compared by content. Rescaled or re-encoded images are not found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmpipe.benchmarks.base import Question
from mmpipe.benchmarks.prepare import read_questions
from mmpipe.data.report import EXAMPLES


def contamination(mixture: Path, benchmarks: Mapping[str, Path]) -> dict[str, Any]:
    """Numbers of images of each prepared benchmark that are in the mixture, and of affected questions.

    Only the images of the benchmarks are held in memory; a mixture may have millions.
    """
    from mmpipe.data.record_table import read_digests  # reads Arrow, which planning does without

    questions = {name: read_questions(prepared) for name, prepared in benchmarks.items()}
    asked = {name: _asked(its) for name, its in questions.items()}
    wanted = {digest for images in asked.values() for digest in images.values()}
    trained: dict[bytes, str] = {}
    total = 0
    for name, digest in read_digests(mixture):
        total += 1
        if digest in wanted:
            trained.setdefault(digest, name)
    shared = {name: _shared(trained, asked[name], its) for name, its in questions.items()}
    return {"images": total, "benchmarks": shared}


def _asked(questions: Sequence[Question]) -> dict[Path, bytes]:
    """The digest of every image of a benchmark."""
    from mmpipe.data.images import content_digest

    paths = {path for question in questions for path in question.images if isinstance(path, Path)}
    return {path: content_digest(path.read_bytes()) for path in sorted(paths)}


def _shared(trained: Mapping[bytes, str], asked: Mapping[Path, bytes], questions: Sequence[Question]) -> dict[str, Any]:
    found = {path: trained[digest] for path, digest in asked.items() if digest in trained}
    return {
        "images": len(asked),
        "shared_images": len(found),
        "questions": len(questions),
        "touched_questions": sum(any(path in found for path in question.images) for question in questions),
        "examples": [f"{path.name} is {name}" for path, name in list(found.items())[:EXAMPLES]],
    }
