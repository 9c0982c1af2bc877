"""Sample questions with their images, what the model answered, and the verdict."""

from __future__ import annotations

from pathlib import Path

from mmpipe.artifacts.files import read_jsonl
from mmpipe.benchmarks.prepare import evenly, read_questions
from mmpipe.data.images import data_url
from mmpipe.report.page import write_page

SHOWN = 24
_LONGEST = 600


def samples_page(prepared: Path, answers: Path, per_item: Path, page: Path, shown: int = SHOWN) -> None:
    """Show ``shown`` questions spread evenly over a benchmark.

    Answers and questions stand in the same order (gathering proves it), and so do the verdicts.
    """
    rows = list(zip(read_questions(prepared), read_jsonl(answers), read_jsonl(per_item), strict=True))
    chosen = evenly(rows, shown)
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
        for question, answer, verdict in chosen
    ]
    write_page(
        page,
        "samples.html",
        title=f"Answers of {answers.parts[-4]} to {prepared.name}",
        samples=samples,
        total=len(rows),
    )
