"""What all sources share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmpipe.config.base import Settings


class Source(Settings):
    """An entry of ``backbones.yaml`` or ``datasets.yaml``."""

    description: str = ""
    """What it is, in one line."""
    licence: str = ""
    """The licence it is given under, as its publisher names it."""
    homepage: str = ""
    """Where a person reads about it."""

    def fetch(self, out: Path) -> dict[str, Any]:
        """Bring the entry's files into ``out`` and return facts for the manifest.

        Called again after an interruption; a source that can go on where it stopped does so.
        """
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """What determines the content; descriptions do not."""
        notes = {"description", "licence", "homepage"}
        return self.model_dump(mode="json", exclude_defaults=True, exclude=notes) | {"source": self.kind}

    @property
    def kind(self) -> str:
        """The value of the ``source`` key."""
        return str(type(self).model_fields["source"].default)
