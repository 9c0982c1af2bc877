"""Sources of catalogue entries, one file per kind.

Each module defines one ``Source`` subclass with a literal ``source`` field; :func:`source_type` is their union.
"""

from __future__ import annotations

import functools
import operator
from typing import Annotated, Any

from pydantic import Field

from mmpipe.registry import modules
from mmpipe.sources.base import Source


@functools.cache
def source_type() -> Any:
    """The union of all sources, discriminated by their ``source`` key."""
    kinds = [
        member
        for module in modules("mmpipe.sources").values()
        for member in vars(module).values()
        if isinstance(member, type) and issubclass(member, Source) and member.__module__ == module.__name__
    ]
    return Annotated[functools.reduce(operator.or_, kinds), Field(discriminator="source")]
