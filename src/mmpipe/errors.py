"""Errors that are meant for the person at the keyboard.

Every error says what is wrong, where (file, record, key) and how to mend it; the command line and the rule
scripts print the message without a traceback and exit with a non-zero status.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MmpipeError(Exception):
    """Base of all errors caused by input, configuration or environment rather than by a defect of the code."""


class ConfigError(MmpipeError):
    """A configuration file says something that cannot be carried out."""


class DataError(MmpipeError):
    """A data set, a record or a picture is not what it should be."""


class ArtifactError(MmpipeError):
    """A published artifact is missing, incomplete or of another kind than expected."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name nearest to ``name``, or the list of known names.

    Meant to be appended to a message about an unknown name.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""
