"""What all sources share, and what those share that download."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from mmpipe.config.base import Settings
from mmpipe.data.spec import InnerPath
from mmpipe.errors import DataError

if TYPE_CHECKING:
    from mmpipe.fetching.desk import Desk

_NOTES = frozenset(
    {"description", "licence", "homepage", "size_gb", "records", "layout", "subfolder", "shape"}
)
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Source(Settings):
    """An entry of ``backbones.yaml`` or ``datasets.yaml``."""

    NOTES: ClassVar[frozenset[str]] = _NOTES
    """Fields that do not change what is fetched: they describe the entry, or say how its files are read."""

    description: str = ""
    """What it is, in one line."""
    licence: str = ""
    """The licence it is given under, as its publisher names it."""
    homepage: str = ""
    """Where a person reads about it."""
    size_gb: float | None = Field(None, gt=0)
    """About how many GB are fetched, where that is known; the disk must have that room."""
    records: int | None = Field(None, gt=0)
    """How many records (or pictures) its publishers name."""
    layout: str = "stock"
    """Backbones: how the files name their tensors, a module of ``mmpipe.lineage``. ``stock`` is what transformers writes."""
    shape: dict[str, Any] = {}
    """Backbones: what their ``config.json`` says of their size, for estimates before they are fetched."""
    subfolder: InnerPath | None = None
    """Backbones: the folder of the fetched files that holds the checkpoint; default: their top."""

    def fetch(self, out: Path, locked: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Bring the entry's files into ``out`` and return facts for the manifest.

        Called again after an interruption; a source that can go on where it stopped does so. ``locked`` is what the lock
        says about the entry: what is fetched must agree with it.
        """
        raise NotImplementedError

    def needs(self) -> tuple[str, ...]:
        """Other data sets that must be there first."""
        return ()

    def spec(self) -> dict[str, Any]:
        """What determines the content; descriptions do not."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude=set(self.NOTES)) | {
            "source": self.kind
        }

    @property
    def kind(self) -> str:
        """The value of the ``source`` key."""
        return str(type(self).model_fields["source"].default)


class WantedFile(Settings):
    """A file of an entry, and how to know the right one."""

    to: InnerPath
    """Where it goes, relative to the entry's directory."""
    sha256: Sha256 | None = None
    """The digest it must have; where nobody publishes one, the lock keeps that of the first fetch."""
    size: int | None = Field(None, gt=0)
    """Its size in bytes, if known."""


class Downloaded(Source):
    """A source whose files come to this machine and are ours from then on.

    Everything happens in a directory beside the entry's and moves there when it is whole. An interrupted fetch goes on where
    it stopped: what was downloaded is not downloaded again, what was unpacked is not unpacked again.
    """

    unpack: dict[InnerPath, InnerPath] = {}
    """Archives to unpack and the folder for each, in this order (``images.zip: images``). A name may be a pattern
    (``images.zip.part*``) for one archive in several pieces. The archives are removed once they are unpacked."""
    flat: bool = False
    """Drop the folders inside the archives, as ``unzip -j`` does."""

    @abstractmethod
    def bring(self, desk: Desk) -> dict[str, Any]:
        """Bring the files to ``desk.files`` and return facts for the manifest."""

    def fetch(self, out: Path, locked: Mapping[str, Any] | None = None) -> dict[str, Any]:
        from mmpipe.fetching.desk import desk_for
        from mmpipe.fetching.space import check_space

        with desk_for(out, self.spec(), locked or {}) as desk:
            if self.size_gb and not desk.started:
                # an archive and its contents are there at the same time
                check_space(desk.files, self.size_gb * 1e9 * (2 if self.unpack else 1), str(out))
            desk.once(lambda: self.bring(desk))
            for pattern, folder in self.unpack.items():
                desk.unpack(pattern, folder, self.flat)
            facts = desk.facts()
            desk.publish(out)
        return facts


def check_online(what: str) -> None:
    """Raise DataError when the environment says that this machine stays offline (``HF_HUB_OFFLINE``)."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise DataError(
            f"{what} is not on this machine, and HF_HUB_OFFLINE forbids the network; "
            "run this rule where there is a network, or name a copy on disk with 'source: path'"
        )
