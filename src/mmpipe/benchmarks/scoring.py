"""Scoring and converting answer files, for rules and command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import sha256, write_json, write_jsonl
from mmpipe.benchmarks.base import get, names
from mmpipe.benchmarks.jsonl import JsonDict, read_answers, read_document, records_of


def score_files(
    benchmark: str,
    references: Sequence[Path],
    answers: Sequence[Path],
    *,
    protocol: str = "",
    judge: Path | None = None,
    per_item: Path | None = None,
    out: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> JsonDict:
    """Score answer files of ``benchmark`` and return ``{benchmark, protocol, n, metrics, missing, unparsed, ...}``.

    ``references`` are the official files (several where the official form is several), or JSON lines of the same
    records. ``answers`` are JSON lines with ``question_id`` and ``text``. ``judge`` holds a judge model's replies
    (``question_id``, ``reply``) for the benchmarks that need one; answers may also carry them as ``judge_reply``.
    ``per_item`` and ``out`` are written if given; ``provenance`` is added to the hashes of the files, under their key
    ``lineage``. Raises DataError for unreadable files, duplicate answers and answers of another split.
    """
    task = get(benchmark)
    replies = read_answers(answers)
    judged = [{**reply, "reply": reply["judge_reply"]} for reply in replies if "judge_reply" in reply]
    judgements = read_judgements(judge) if judge else judged or None
    score = task.score(task.read_references(references), replies, protocol, judgements)
    result = score.as_json() | {
        "lineage": {
            "answers": [_card(path) for path in answers],
            "references": [_card(path) for path in references],
            **({"judge": _card(judge)} if judge else {}),
            **(provenance or {}),
        }
    }
    if per_item:
        write_jsonl(per_item, (item.as_json() for item in score.items))
    if out:
        write_json(out, result)
    return result


def convert_files(benchmark: str, references: Sequence[Path], answers: Sequence[Path], out: Path) -> JsonDict:
    """Write the submission file of ``benchmark`` and return facts to report about it.

    Raises DataError as ``score_files`` does.
    """
    task = get(benchmark)
    pairs = task.pair(task.read_references(references), read_answers(answers))
    report = task.convert(pairs, out)
    missing = sum(not pair.answered for pair in pairs)
    return {"benchmark": benchmark, "out": str(out), "n": len(pairs), "missing": missing, **report}


def describe() -> list[JsonDict]:
    """Every benchmark with its protocols, for lists and documentation."""
    shown = ("name", "aliases", "about", "judged", "max_new_tokens")
    return [
        {
            "benchmark": task.name,
            "about": (type(task).__doc__ or "").strip(),
            "files": dict(task.files),
            "submission": task.submission,
            "protocols": [{name: getattr(protocol, name) for name in shown} for protocol in task.protocols],
        }
        for task in map(get, names())
    ]


def read_judgements(path: Path) -> list[JsonDict]:
    """The judge's records from JSON lines with ``question_id`` and ``reply``.

    Raises DataError for a record without these fields.
    """
    return records_of([read_document(path)], ("question_id", "reply"))


def _card(path: Path) -> JsonDict:
    card = {"path": path.as_posix()}
    return card | {"sha256": sha256(path)} if path.is_file() else card
