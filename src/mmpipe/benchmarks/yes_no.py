"""Yes/no questions: parsing of free replies, by the rules in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from mmpipe.benchmarks.base import SHORT_ANSWER, AnswerPair, Benchmark, Item, Protocol
from mmpipe.benchmarks.jsonl import JsonDict
from mmpipe.benchmarks.short_answer import LONE_PERIOD, drop_punctuation

YES, NO, OTHER = "yes", "no", "other"


def llava_pope(reply: str) -> str:
    """LLaVA's rule for POPE (``eval_pope.py``): "no" if the text before the first period has the word ``No``,
    ``no`` or ``not`` (commas deleted, words split at single blanks), else "yes"."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return NO if {"No", "not", "no"}.intersection(words) else YES


def first_four(reply: str) -> str:
    """MME's rule (``calculation.py``): the lower-cased reply itself, or "yes" or "no" within its first four characters.

    >>> first_four("Not sure")
    'no'
    """
    reply = reply.lower()
    if reply in (YES, NO):
        return reply
    if YES in reply[:4]:
        return YES
    return NO if NO in reply[:4] else OTHER


def first_four_lmms(reply: str) -> str:
    """lmms-eval's rule for MME: blanks at the ends and periods deleted first, ``y`` and ``n`` accepted."""
    reply = reply.lower().strip().replace(".", "")
    return {"y": YES, "n": NO}.get(reply) or (OTHER if len(reply) == 1 else first_four(reply))


def equal_lmms(reply: str) -> str:
    """lmms-eval's rule for POPE: nothing but "yes" or "no", in any case."""
    reply = reply.lower().strip()
    return reply if reply in (YES, NO) else OTHER


def yes_in_it(reply: str) -> str:
    """lmms-eval's rule for HallusionBench without judge: "yes" if the reply has these letters anywhere, else "no"."""
    return YES if YES in reply.lower() else NO


def yes_or_no_word(reply: str) -> str:
    """VLMEvalKit's rule: one of the words "yes" and "no", but not both."""
    words = {YES, NO}.intersection(drop_punctuation(reply.lower(), period=LONE_PERIOD).split())
    return words.pop() if len(words) == 1 else OTHER


class YesNo(Benchmark):
    """Questions answered by yes or no: the protocol's rule reads ``yes``, ``no`` or ``other`` from the reply."""

    rules: ClassVar[Mapping[str, Callable[[str], str]]]
    prompts = {"llava": "{question}" + SHORT_ANSWER}
    carried: ClassVar[Sequence[str]] = ("category",)
    shown: ClassVar[Sequence[str]] = ("category",)

    def gold(self, reference: JsonDict) -> str:
        """The right answer, ``yes`` or ``no``."""
        return str(reference["answer"]).strip().lower()

    def facts(self, reference: JsonDict) -> JsonDict:
        """Further fields of the item: ``shown`` and the right answer."""
        return {**{name: reference[name] for name in self.shown}, "gold": self.gold(reference)}

    def item(self, pair: AnswerPair, protocol: Protocol) -> Item:
        parsed = self.rules[protocol.rule](pair.text)
        return self.result(
            pair, parsed == self.gold(pair.reference), parsed, parsed == OTHER, **self.facts(pair.reference)
        )
