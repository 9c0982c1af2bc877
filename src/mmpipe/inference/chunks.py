"""Answering in resumable chunks: split, append, resume, publish, gather.

A chunk's progress is ``answers.partial.jsonl`` in its state directory, one line an answer, appended as answers come.
After an interruption answered questions are skipped; a truncated last line is dropped.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from mmpipe.artifacts.files import json_line, read_jsonl, recover_lines, write_jsonl
from mmpipe.errors import ArtifactError, DataError
from mmpipe.inference.question import Answer, Key, Question

PARTIAL = "answers.partial.jsonl"


def split(questions: Sequence[Question], chunks: int) -> list[list[Question]]:
    """``chunks`` contiguous parts whose sizes differ by one at most; with fewer questions than chunks some are empty.

    Questions that share their images are often neighbours; contiguous parts keep them together.
    """
    size, larger = divmod(len(questions), chunks)
    ends = [size * number + min(number, larger) for number in range(chunks + 1)]
    return [list(questions[start:end]) for start, end in pairwise(ends)]


def answer_chunk(
    questions: Sequence[Question],
    ask: Callable[[list[Question]], Iterable[Answer]],
    state: Path,
    out: Path,
    keep: Callable[[Iterable[Key]], set[Key]] | None = None,
) -> dict[str, int]:
    """Answer ``questions`` by ``ask``, which yields one record each in any order, and publish them as ``out``.

    Records in ``state`` are reused, only those that ``keep`` accepts if given. The caller makes sure
    that ``state`` belongs to the same model and settings. Returns how many were resumed and asked. Raises ArtifactError
    when ``ask`` leaves a question unanswered.
    """
    partial = state / PARTIAL
    state.mkdir(parents=True, exist_ok=True)
    wanted = [question.key for question in questions]
    asked_for = set(wanted)
    done = {k: answer for answer in _recover(partial) if (k := _answer_key(answer)) in asked_for}
    if keep is not None:
        retained = keep(done)
        done = {k: answer for k, answer in done.items() if k in retained}
    resumed = len(done)
    left = [question for question in questions if question.key not in done]
    if left:
        with partial.open("ab") as file:
            for answer in ask(left):
                file.write(json_line(answer))
                file.flush()
                done[_answer_key(answer)] = answer
            os.fsync(file.fileno())
    unanswered = [k[0] for k in wanted if k not in done]
    if unanswered:
        raise ArtifactError(f"{out}: {len(unanswered)} questions were not answered, e.g. {unanswered[:5]}")
    write_jsonl(out, (done[k] for k in wanted))
    return {"resumed": resumed, "asked": len(left)}


def gather(questions: Sequence[Question], parts: Sequence[Path], out: Path) -> int:
    """Join the answers of all chunks into ``out`` in the order of the questions; returns their number.

    Raises DataError naming the questions that are unanswered, answered twice or unknown.
    """
    answers = [answer for part in parts for answer in read_jsonl(part)]
    by_key = {_answer_key(answer): answer for answer in answers}
    wanted = [question.key for question in questions]
    known = set(wanted)
    counts = Counter(map(_answer_key, answers))
    faults = {
        "unanswered": [k for k in wanted if k not in counts],
        "answered more than once": [k for k, count in counts.items() if count > 1],
        "unknown": [k for k in counts if k not in known],
    }
    if any(faults.values()):
        text = "; ".join(
            f"{what}: {', '.join(k[0] for k in keys[:10])}{' ...' if len(keys) > 10 else ''}"
            for what, keys in faults.items()
            if keys
        )
        raise DataError(f"{out}: the answers do not match the questions ({text}); remove the chunks and run again")
    write_jsonl(out, (by_key[k] for k in wanted))
    return len(answers)


def _answer_key(answer: Answer) -> Key:
    return str(answer["question_id"]), answer["prompt"]


def _recover(partial: Path) -> Iterator[Answer]:
    """The complete records of a partial file, which is truncated after them."""
    for number, line in enumerate(recover_lines(partial, _is_record), start=1):
        if not _is_record(line):
            raise ArtifactError(f"{partial}, line {number}: not an answer; remove the file to start this chunk afresh")
        yield json.loads(line)


def _is_record(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and "question_id" in record and "prompt" in record
