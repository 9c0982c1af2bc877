"""Which rows of their vocabularies a teacher and a student share.

Heads are padded to round sizes (Qwen2-7B has 152064 rows, Qwen2-0.5B 151936, their tokenizers are the same),
so distributions are compared over the leading rows both have. That is only right when each id means the same
token.
"""

from __future__ import annotations

from typing import Protocol

from mmpipe.errors import ConfigError


class HasVocabulary(Protocol):
    """The part of a tokenizer that matters here."""

    def get_vocab(self) -> dict[str, int]: ...


def shared_rows(student: HasVocabulary, teacher: HasVocabulary, student_rows: int, teacher_rows: int) -> int:
    """The number of leading rows both heads have, after comparing the tokenizers id by id.

    Rows beyond a tokenizer's last token are padding and may differ in number.

    Raises ConfigError when an id below that number is another token for the teacher than for the student, or
    when a token's id is beyond it.
    """
    of_student = {i: token for token, i in student.get_vocab().items()}
    of_teacher = {i: token for token, i in teacher.get_vocab().items()}
    rows = min(student_rows, teacher_rows)
    different = sorted(
        i for i in of_student.keys() | of_teacher.keys() if of_student.get(i) != of_teacher.get(i) or i >= rows
    )
    if different:
        shown = ", ".join(f"{i} ({_name(of_student, i)} / {_name(of_teacher, i)})" for i in different[:5])
        raise ConfigError(
            f"student and teacher do not share a vocabulary: of the {rows} rows both heads have, "
            f"{len(different)} ids differ, the first (student / teacher): {shown}. "
            "Distillation compares distributions id by id: take a teacher with the student's tokenizer"
        )
    return rows


def token_rows(tokenizer: HasVocabulary) -> int:
    """The number of leading rows of a head that stand for tokens; those beyond are padding."""
    return max(tokenizer.get_vocab().values()) + 1


def _name(tokens: dict[int, str], i: int) -> str:
    return repr(tokens[i]) if i in tokens else "nothing"
