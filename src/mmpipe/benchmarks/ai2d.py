"""AI2D (Kembhavi et al. 2016, arXiv 1603.07396): multiple choice about textbook diagrams.

Files are the parquet files of the test split in the copy that everyone evaluates (``question, options, answer, image``;
the answer is the number of the option). There is no official scorer; the default is the rule of lmms-eval
(``tasks/ai2d/utils.py``): a leading letter with a period is taken for the reply, and case and punctuation are
ignored.
"""

from __future__ import annotations

import re
import string

from mmpipe.benchmarks.base import AnswerPair, Item, Protocol
from mmpipe.benchmarks.jsonl import JsonDict, key
from mmpipe.benchmarks.multiple_choice import LETTERS, MultipleChoice, infer_option
from mmpipe.errors import DataError

_LEADING_LETTER = re.compile(r"\s*([A-Z])\.")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Ai2d(MultipleChoice):
    """AI2D's test split."""

    name = "ai2d"
    files = {"questions": "data"}
    fields = ("question", "options", "answer")
    image = ""
    rules = {"infer": infer_option}
    protocols = (
        Protocol(
            "lmms", "lmms-eval: exact match after taking a leading letter", metric="exact_match", max_new_tokens=16,
            aliases=("llava",),
        ),
        Protocol("libmoe", "the same rule with longer replies", metric="exact_match", max_new_tokens=512),
        Protocol("vlmevalkit", "VLMEvalKit's option rule without judge", rule="infer"),
    )  # fmt: skip

    def gold(self, reference: JsonDict) -> str:
        """The letter of the right option. Raises DataError for an answer that is no option's number or letter."""
        answer = key(reference["answer"])
        if answer.isdecimal() and int(answer) < len(reference["options"]):
            return LETTERS[int(answer)]
        if len(answer) == 1 and answer in LETTERS:
            return answer
        raise DataError(f"ai2d: question {reference['question_id']} has the answer {answer!r}, not an option's number")

    def item(self, pair: AnswerPair, protocol: Protocol) -> Item:
        if protocol.rule == "infer":
            return super().item(pair, protocol)
        gold, found = self.gold(pair.reference), _LEADING_LETTER.match(pair.text)
        parsed = found.group(1) if found else pair.text.strip()
        plain = parsed.lower().translate(_NO_PUNCTUATION)
        return self.result(pair, plain == gold.lower(), parsed, plain not in tuple(LETTERS.lower()), gold=gold)


BENCHMARK = Ai2d()
