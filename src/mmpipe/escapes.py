"""Text that is not ours where it is shown: control characters, rich's markup, CSV cells, and secrets in addresses.

Ids, titles, file names, replies of servers and answers of models are data. Each way out has one escape: the terminal
(:func:`printable`, :func:`markup`, :func:`json_text`), logs (:class:`LogFormatter`), CSV files (:func:`csv_cell`), and
pages, which Jinja escapes. Secrets are hidden by :func:`redacted` in all of them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
from types import TracebackType
from typing import Any

HIDDEN = "***"

_SHOWN = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}
# C1 controls; bidirectional overrides, which disguise text (CVE-2021-42574); line separators; halves of surrogate pairs,
# which no terminal or log file can encode
_CODED = [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029, *range(0xD800, 0xE000)]
_SHOWN |= {code: f"<{code:02X}>" for code in _CODED}
_LINE = {ord("\n"): "␊", ord("\t"): "␉"}
_IN_JSON = {code: f"\\u{code:04x}" for code in (0x7F, *_CODED)}

_SECRET_NAMES = (
    r"[\w.-]*(?:token|secret|signature|passw(?:or)?d|credential|session|jwt|(?:access|api|private|auth|account)[_-]?key)"
    r"[\w.-]*|[\w.-]*key[_-]?(?:pair[_-]?)?id|key|sig|auth|pass|pwd|policy|hmac|hdnea"
)
_SECRETS = (
    (re.compile(r"(://)[^\s/?#\"'<>]+@"), rf"\1{HIDDEN}@"),
    (re.compile(rf"([?&;]|%3f|%26)((?:{_SECRET_NAMES})(?:=|%3d))[^\s&;#\"'<>)\]]+", re.IGNORECASE), rf"\1\2{HIDDEN}"),
    (re.compile(r"\b(Bearer|Basic) [\w.~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), HIDDEN),
)
_SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_SHORTEST_SECRET = 8
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_named: set[str] = set()


def redacted(text: str, *, environment: bool = True) -> str:
    """``text`` without the secrets of addresses (names and passwords, tokens, signatures) and, unless the result must be
    the same on every machine, of the ``environment``.

    >>> redacted("https://me:secret@host/a.zip?id=7&X-Amz-Signature=0f3a&token=abc")
    'https://***@host/a.zip?id=7&X-Amz-Signature=***&token=***'
    """
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    for secret in _environment_secrets() if environment else ():
        text = text.replace(secret, HIDDEN)
    return text


def _environment_secrets() -> set[str]:
    """Values of variables that are secret by their names or because an address names them."""
    found = {value for name, value in os.environ.items() if name in _named or _SECRET_VARIABLE.search(name)}
    return {value for value in found if len(value) >= _SHORTEST_SECRET}


def with_variables(text: str) -> str:
    """``text`` with the environment's values in the places of ``${NAME}``; they are secrets from now on. Raises KeyError
    with the name of a variable that is not set."""

    def value(match: re.Match[str]) -> str:
        _named.add(match[1])
        return os.environ[match[1]]

    return _VARIABLE.sub(value, text)


def printable(text: object, *, line: bool = False) -> str:
    """``text`` with a visible sign in place of every control character, so that it cannot clear a terminal or set its
    title. Line feeds and tabs stay; with ``line`` they are signs too.

    >>> printable("\\x1b[2Jcleared"), printable("a\\nb", line=True)
    ('␛[2Jcleared', 'a␊b')
    """
    return str(text).translate(_SHOWN | _LINE if line else _SHOWN)


def message(text: object) -> str:
    """A message of one or several lines for a terminal or a log: the lines after the first are marked, so that none of
    them passes for a message of its own. Secrets are hidden.

    >>> message("bad id 'a\\nFinished jobid: 3'")
    "bad id 'a\\n  | Finished jobid: 3'"
    """
    return printable(redacted(str(text))).replace("\n", "\n  | ")


def markup(text: object) -> str:
    """``text`` in one line, for rich: without control characters, its brackets are no markup, its secrets hidden."""
    from rich.markup import escape

    return escape(printable(redacted(str(text).strip()), line=True))


def json_text(value: Any) -> str:
    """Readable JSON for a terminal: control characters, C1 ones too, as JSON's own escapes."""
    return json.dumps(value, indent=2, ensure_ascii=False).translate(_IN_JSON)


def csv_cell(value: Any) -> Any:
    """A cell of a CSV file. A text that a spreadsheet would take for a formula gets an apostrophe before it (OWASP, CSV
    injection); numbers stay.

    >>> csv_cell("=1+1"), csv_cell("-0.5"), csv_cell(-0.5)
    ("'=1+1", '-0.5', -0.5)
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\n", "␍")) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def escape_tracebacks() -> None:
    """Print uncaught errors, and warnings that no handler of a log takes, as :func:`message` does."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(message("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr)

    sys.excepthook = show
    if logging.lastResort:
        logging.lastResort.setFormatter(LogFormatter("%(message)s"))


class LogFormatter(logging.Formatter):
    """A formatter whose lines are as :func:`message` makes them, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return message(super().format(record))
