"""Chunks resume, publish whole files, and prove that every question is answered once."""

from __future__ import annotations

import json

import pytest

from mmpipe.artifacts.files import read_jsonl
from mmpipe.benchmarks.base import Question
from mmpipe.errors import ArtifactError, DataError
from mmpipe.inference.chunks import PARTIAL, answer_chunk, gather, split

QUESTIONS = [Question(id=n, text=f"Q{n % 5}?") for n in range(10)]


def reply(question: Question) -> dict:
    return {"question_id": question.id, "prompt": question.text, "text": f"a{question.id}\u2028\ud800"}


@pytest.mark.parametrize(("n", "k"), [(10, 3), (3, 8), (0, 2), (9, 4), (5, 4)])
def test_chunks_are_balanced_and_complete(n, k):
    parts = split(QUESTIONS[:n], k)
    assert len(parts) == k
    assert [q.id for part in parts for q in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_interrupted_chunk_resumes_without_asking_again(tmp_path):
    def dies(questions):
        for number, question in enumerate(questions):
            if number == 4:
                raise KeyboardInterrupt
            yield reply(question)

    out, state = tmp_path / "out.jsonl", tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        answer_chunk(QUESTIONS, dies, state, out)
    assert not out.exists()
    with (state / PARTIAL).open("ab") as file:
        file.write(b'{"question_id": 4, "prompt": "Q4?", "te')  # torn by the interruption
    asked = []

    def backwards(questions):
        asked.extend(q.id for q in questions)
        return (reply(q) for q in reversed(questions))

    assert answer_chunk(QUESTIONS, backwards, state, out) == {"resumed": 4, "asked": 6}
    assert asked == [4, 5, 6, 7, 8, 9]
    fresh = tmp_path / "fresh.jsonl"
    answer_chunk(QUESTIONS, lambda qs: map(reply, qs), tmp_path / "state2", fresh)
    assert out.read_bytes() == fresh.read_bytes()
    assert answer_chunk(QUESTIONS, dies, state, out) == {"resumed": 10, "asked": 0}


def test_empty_chunk_is_an_empty_file(tmp_path):
    answer_chunk([], lambda _: pytest.fail("nothing to ask"), tmp_path / "state", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_question_left_open_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match=r"1 questions were not answered.*'9'"):
        answer_chunk(QUESTIONS, lambda qs: map(reply, qs[:-1]), tmp_path / "s", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_damaged_progress_in_the_middle_is_an_error(tmp_path):
    lines = [json.dumps(reply(q)) for q in QUESTIONS[:3]]
    (tmp_path / PARTIAL).write_text("\n".join([lines[0], "garbage", lines[2], ""]))
    with pytest.raises(ArtifactError, match="line 2"):
        answer_chunk(QUESTIONS, lambda qs: map(reply, qs), tmp_path, tmp_path / "out.jsonl")


def test_gather_restores_the_order_of_the_questions(tmp_path):
    parts = []
    for number, part in enumerate(split(QUESTIONS, 4)):
        parts.append(tmp_path / f"{number}.jsonl")
        answer_chunk(part, lambda qs: map(reply, qs[::-1]), tmp_path / f"state{number}", parts[-1])
    assert gather(QUESTIONS, parts[::-1], tmp_path / "all.jsonl") == 10
    assert [a["question_id"] for a in read_jsonl(tmp_path / "all.jsonl")] == list(range(10))


def test_gather_names_what_is_wrong(tmp_path):
    part = tmp_path / "part.jsonl"
    answers = [reply(q) for q in QUESTIONS[1:]] + [reply(QUESTIONS[3]), reply(Question(id="x", text="?"))]
    part.write_text("".join(json.dumps(a) + "\n" for a in answers))
    with pytest.raises(DataError, match="unanswered: 0; answered more than once: 3; unknown: x"):
        gather(QUESTIONS, [part], tmp_path / "all.jsonl")
    assert not (tmp_path / "all.jsonl").exists()
