"""What all sources share, and what those share that download."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from mmpipe.data.spec import InnerPath
from mmpipe.errors import DataError
from mmpipe.settings import Settings

if TYPE_CHECKING:
    from mmpipe.sources.transfer.staging import Desk

log = logging.getLogger(__name__)
_NOTES = frozenset(
    {"description", "licence", "restricted", "homepage", "size_gb", "records", "layout", "subfolder", "shape"}
)
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Restriction = Literal["non-commercial", "research only", "consent"]


class Source(Settings):
    """An entry of ``backbones.yaml`` or ``datasets.yaml``."""

    NOTES: ClassVar[frozenset[str]] = _NOTES
    """Fields that do not change what is fetched: they describe the entry, or say how its files are read."""

    description: str = ""
    """What it is, in one line."""
    licence: str = ""
    """The licence it is given under, as its publisher names it; empty where none is stated."""
    restricted: Annotated[
        tuple[Restriction, ...],
        BeforeValidator(
            lambda value: [value] if isinstance(value, str) else value,
            json_schema_input_type=Restriction | tuple[Restriction, ...],
        ),
    ] = ()
    """What the licence allows no more than, or ``consent``: somebody with an account has to accept terms first."""
    homepage: str = ""
    """Where a person reads about it."""
    size_gb: float | None = Field(None, gt=0)
    """About how many GB are fetched, where that is known; the disk must have that room."""
    records: int | None = Field(None, gt=0)
    """How many records (or images) its publishers name."""
    layout: Annotated[str, BeforeValidator(lambda name: "hf" if name == "stock" else name)] = "hf"
    """Backbones: how the files name their tensors, a module of ``mmpipe.checkpoints.layouts``; ``hf``
    (formerly ``stock``) is what transformers writes."""
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

    @property
    def terms(self) -> str:
        """The licence and what restricts its use, in a line."""
        return "; ".join([self.licence or "licence not stated", *self.restricted])

    def needs(self) -> tuple[str, ...]:
        """Other data sets that must be there first."""
        return ()

    def spec(self) -> dict[str, Any]:
        """What determines the content; descriptions do not."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude=set(self.NOTES)) | {"source": self.kind}

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

    def wanted(self) -> tuple[WantedFile, ...]:
        """The files, where the entry names each."""
        return ()

    def announced(self, locked: Mapping[str, Any]) -> float:
        """Bytes to be fetched as far as the catalogue or the lock knows; 0 when neither does."""
        if self.size_gb:
            return self.size_gb * 1e9
        pinned = {name: pin["size"] for name, pin in locked.get("downloads", {}).items()}
        return sum((pinned | {file.to: file.size for file in self.wanted() if file.size}).values())

    def fetch(self, out: Path, locked: Mapping[str, Any] | None = None) -> dict[str, Any]:
        from mmpipe.sources.transfer.progress import progress
        from mmpipe.sources.transfer.space import check_space
        from mmpipe.sources.transfer.staging import desk_for

        with desk_for(out, self.spec(), locked or {}) as desk:
            log.log(logging.WARNING if self.restricted else logging.INFO, "%s: %s", out.name, self.terms)
            desk.total = self.announced(desk.locked)
            if not desk.started:
                # an archive and its contents are there at the same time
                check_space(desk.files, desk.total * (2 if self.unpack else 1), str(out))
            with progress(desk.files, out.name, lambda: desk.total):
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
