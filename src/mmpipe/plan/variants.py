"""Variants: checkpoints evaluated with another keep rate than in training, by a suffix of the reference,
``recipe@stage+keep0.5``.

``+keep0.5`` retains half of each image's tokens, ``+whole`` retains everything, as the dense model does. Only sparsified
checkpoints have variants.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmpipe.errors import ConfigError

PATTERN = r"\+(?:keep[0-9.]+|whole)"
"""The suffixes that rules accept after a checkpoint."""


@dataclass(frozen=True)
class Variant:
    """The keep rate of a checkpoint."""

    keep_rate: float | None
    """Share of each image's tokens; None retains everything."""

    @property
    def suffix(self) -> str:
        """The suffix in a reference."""
        return "+whole" if self.keep_rate is None else f"+keep{self.keep_rate:g}"


def split(reference: str, where: str = "") -> tuple[str, Variant | None]:
    """A reference without its variant, and the variant if it has one.

    Raises ConfigError, opened by ``where``, for an unknown suffix and for rates outside (0, 1].

    >>> split("demo@sparsify+keep0.5")
    ('demo@sparsify', Variant(keep_rate=0.5))
    """
    base, plus, suffix = reference.partition("+")
    if not plus:
        return base, None
    if suffix == "whole":
        return base, Variant(None)
    rate = re.fullmatch(r"keep([0-9]*\.?[0-9]+)", suffix)
    if not rate:
        raise ConfigError(f"{where}: '{reference}': '+{suffix}' is no variant; known: +keep0.5 (any rate), +whole")
    if not 0 < float(rate[1]) <= 1:
        raise ConfigError(f"{where}: '{reference}': a keep rate is above 0 and at most 1")
    return base, Variant(float(rate[1]))
