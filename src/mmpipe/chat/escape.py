"""Making a model's text safe to show in a terminal."""

from __future__ import annotations

_KEPT = {"\n", "\t"}
# Marks that turn the direction of what follows (CVE-2021-42574): text could look other than it is.
_TURNING = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_SHOWN = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in _KEPT}
_SHOWN |= {0x7F: "\u2421"} | {code: f"<{code:02X}>" for code in (*range(0x80, 0xA0), *_TURNING)}


def visible(text: str) -> str:
    """``text`` with every control character but line feed and tab replaced by an image of it.

    A model can be led to write escape sequences, which would clear the screen, set its title, or worse.

    >>> visible("\\x1b[2Jcleared")
    '␛[2Jcleared'
    """
    return text.translate(_SHOWN)
