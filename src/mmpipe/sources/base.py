"""The base class of all sources, and that of sources that download."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from mmpipe.data.spec import InnerPath, listed
from mmpipe.errors import DataError
from mmpipe.settings import Settings
from mmpipe.sources.transfer.progress import check_space, progress
from mmpipe.sources.transfer.staging import Staging, WantedFile, open_staging

log = logging.getLogger(__name__)
_NOTES = frozenset(
    {"description", "licence", "restricted", "homepage", "size_gb", "records", "layout", "subfolder", "shape"}
)
Restriction = Literal["non-commercial", "research only", "consent"]


class Source(Settings):
    """An entry of ``backbones.yaml`` or ``datasets.yaml``."""

    NOTES: ClassVar[frozenset[str]] = _NOTES
    """Fields that do not change the fetched files: descriptions, and how the files are read."""

    description: str = ""
    """Description in one line."""
    licence: str = ""
    """The licence as its publisher names it; empty where none is stated."""
    restricted: Annotated[
        tuple[Restriction, ...], BeforeValidator(listed, json_schema_input_type=Restriction | tuple[Restriction, ...])
    ] = ()
    """The uses that the licence is limited to; ``consent``: terms have to be accepted with an account first."""
    homepage: str = ""
    """The page that describes it."""
    size_gb: float | None = Field(None, gt=0)
    """Approximate size of the download in GB, if known; so much disk space must be free."""
    records: int | None = Field(None, gt=0)
    """Number of records (or images) according to its publishers."""
    layout: Annotated[str, BeforeValidator(lambda name: "hf" if name == "stock" else name)] = "hf"
    """Backbones: how the files name their tensors, a module of ``mmpipe.checkpoints.layouts``; ``hf``
    (formerly ``stock``) is what transformers writes."""
    shape: dict[str, Any] = {}
    """Backbones: the sizes in their ``config.json``, for estimates before they are fetched."""
    subfolder: InnerPath | None = None
    """Backbones: the folder of the fetched files that holds the checkpoint; default: their top."""

    def fetch(self, out: Path, locked: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write the entry's files into ``out`` and return facts for the manifest. Called again after an interruption; a
        source resumes where it can. ``locked`` is the entry's part of the lock, which the files must match."""
        raise NotImplementedError

    @property
    def terms(self) -> str:
        """The licence and what restricts its use, in a line."""
        return "; ".join([self.licence or "licence not stated", *self.restricted])

    def needs(self) -> tuple[str, ...]:
        """Other data sets that must be fetched first."""
        return ()

    def spec(self) -> dict[str, Any]:
        """The settings that determine the content; descriptions do not."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude=set(self.NOTES)) | {"source": self.kind}

    @property
    def kind(self) -> str:
        """The value of the ``source`` key."""
        return str(type(self).model_fields["source"].default)


class Downloaded(Source):
    """A source whose files are copied to this machine: staged beside the entry's directory, and moved there
    when complete. An interrupted fetch resumes: no file is downloaded or unpacked twice."""

    unpack: dict[InnerPath, InnerPath] = {}
    """Archives to unpack and the folder for each, in this order (``images.zip: images``). A name may be a pattern
    (``images.zip.part*``) for one archive in several pieces. The archives are removed once they are unpacked."""
    flat: bool = False
    """Drop the folders inside the archives, as ``unzip -j`` does."""

    @abstractmethod
    def fill(self, staging: Staging) -> dict[str, Any]:
        """Fetch the files into ``staging.files`` and return facts for the manifest."""

    def wanted(self) -> tuple[WantedFile, ...]:
        """The files, where the entry names each."""
        return ()

    def announced(self, locked: Mapping[str, Any]) -> float:
        """Bytes to be fetched according to catalogue or lock; 0 when unknown."""
        if self.size_gb:
            return self.size_gb * 1e9
        pinned = {name: pin["size"] for name, pin in locked.get("downloads", {}).items()}
        return sum((pinned | {file.to: file.size for file in self.wanted() if file.size}).values())

    def fetch(self, out: Path, locked: Mapping[str, Any] | None = None) -> dict[str, Any]:
        with open_staging(out, self.spec(), locked or {}) as staging:
            log.log(logging.WARNING if self.restricted else logging.INFO, "%s: %s", out.name, self.terms)
            staging.total = self.announced(staging.locked)
            if not staging.started:
                # an archive and its contents exist at the same time
                check_space(staging.files, staging.total * (2 if self.unpack else 1), str(out))
            with progress(staging.files, out.name, lambda: staging.total):
                staging.once(lambda: self.fill(staging))
            for pattern, folder in self.unpack.items():
                staging.unpack(pattern, folder, self.flat)
            facts = staging.facts()
            staging.publish(out)
        return facts


def check_online(what: str) -> None:
    """Raise DataError when ``HF_HUB_OFFLINE`` is set; ``what`` opens the message."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise DataError(
            f"{what} is not on this machine, and HF_HUB_OFFLINE forbids the network; "
            "run this rule where there is a network, or name a copy on disk with 'source: path'"
        )
