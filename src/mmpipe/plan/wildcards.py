"""Constraints for the wildcards of the rules."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from os.path import commonprefix


def one_of(names: Iterable[str]) -> str:
    """A regular expression for exactly these names; matches nothing when there are none.

    Common beginnings are factored out: Snakemake compiles the expression anew for every output of every rule, and with one
    alternative a name that is the longest part of a dry run.
    """
    return _factored(sorted(set(names))) or "(?!)"


def _factored(words: list[str]) -> str:
    """An expression for sorted words: common beginnings once, and beginnings with the same ends together."""
    beginnings: dict[str, list[str]] = {}
    for _, same in groupby(words, key=lambda word: word[:1]):
        group = list(same)
        prefix = commonprefix(group)  # noqa: RUF071 - of characters, not of paths
        ends = _factored([word[len(prefix) :] for word in group]) if group[1:] else ""
        beginnings.setdefault(ends, []).append(re.escape(prefix))
    return _any([_any(heads) + ends for ends, heads in beginnings.items()])


def _any(options: list[str]) -> str:
    if len(options) < 2:
        return "".join(options)
    return f"[{''.join(options)}]" if all(o.isalnum() and len(o) == 1 for o in options) else f"(?:{'|'.join(options)})"
