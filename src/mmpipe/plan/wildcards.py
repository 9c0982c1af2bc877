"""Constraints for the wildcards of the rules."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from itertools import groupby


def one_of(names: Iterable[str]) -> str:
    """A regular expression for exactly these names; matches nothing when there are none.

    Common prefixes are factored out: Snakemake compiles the expression once a rule's file, which takes a third of the
    time of a dry run with one alternative a name.
    """
    return _factored(sorted(set(names))) or "(?!)"


def _factored(words: list[str]) -> str:
    options = []
    for _, same in groupby(words, key=lambda word: word[:1]):
        group = list(same)
        prefix = os.path.commonprefix(group)
        options.append(re.escape(prefix) + (_factored([word[len(prefix) :] for word in group]) if group[1:] else ""))
    return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})" if options else ""
