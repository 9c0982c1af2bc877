"""Entries of the Hugging Face hub."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Literal

from mmpipe.artifacts.files import sha256
from mmpipe.errors import DataError
from mmpipe.sources.base import Downloaded, check_online
from mmpipe.sources.transfer.progress import check_space
from mmpipe.sources.transfer.staging import Staging

log = logging.getLogger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PASSING = {408, 429, 500, 502, 503, 504}
ATTEMPTS = 5
PAUSE = 2.0
"""Seconds before the second attempt; doubled each time."""


class _Interrupted(Exception):
    """A failed fetch that may succeed when retried."""


class Hub(Downloaded):
    """Download a repository of the hub, or some of its files, at one commit. ``HF_TOKEN`` (or a login), ``HF_ENDPOINT``
    and ``HF_HUB_OFFLINE`` come from the environment, never from a file of the project. Every file is compared with the
    hash that the hub names for it."""

    source: Literal["hub"] = "hub"
    repo: str
    """``owner/name``."""
    revision: str = "main"
    """A commit hash. A branch is allowed: its commit is recorded in the manifest and, by ``mmpipe data
    --lock``, in the lock, which later fetches use."""
    repo_type: Literal["model", "dataset"] = "model"
    include: tuple[str, ...] = ()
    """File patterns to download; empty for all."""
    exclude: tuple[str, ...] = ()
    """File patterns to leave out."""

    def fill(self, staging: Staging) -> dict[str, Any]:
        check_online(self.repo)
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                return self._attempt(staging)
            except _Interrupted as fault:
                log.warning("%s: %s", self.repo, fault)
                last = fault
        raise DataError(
            f"{self.repo}: the hub did not give it in {ATTEMPTS} attempts ({last}); run the same command again later, "
            "set HF_ENDPOINT to a mirror, or name a copy on disk with 'source: path'"
        )

    def _attempt(self, staging: Staging) -> dict[str, Any]:
        """Download and verify the missing files. Raises _Interrupted, or DataError for permanent errors."""
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            commit = self._download(staging)
        except HfHubHTTPError as error:
            if error.response.status_code in _PASSING:
                raise _Interrupted(_first_line(error)) from error
            raise DataError(
                f"{staging.offered.name}: the hub refused {self.repo} at revision {self._revision(staging)} "
                f"({_first_line(error)}); check the names, and HF_TOKEN if the repository asks for consent"
            ) from error
        except (LocalEntryNotFoundError, httpx2.TransportError) as error:
            raise _Interrupted(_first_line(error)) from error
        shutil.rmtree(staging.files / ".cache", ignore_errors=True)
        return {"commit": commit}

    def _revision(self, staging: Staging) -> str:
        """The commit of the catalogue, else of this fetch's first attempt, else of the lock, else the branch."""
        pinned = staging.memory.get("commit") or staging.locked.get("commit")
        return self.revision if _COMMIT.fullmatch(self.revision) or not pinned else str(pinned)

    def _download(self, staging: Staging) -> str:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.hf_api import RepoFile
        from huggingface_hub.utils import disable_progress_bars, filter_repo_objects

        if not sys.stderr.isatty():
            disable_progress_bars()
        endpoint = os.environ.get("HF_ENDPOINT")
        api = HfApi(endpoint=endpoint)
        where: dict[str, Any] = {"repo_id": self.repo, "repo_type": self.repo_type}
        # Resolved once: the branch may move before the next attempt, and snapshot_download, when the hub fails it,
        # takes a half-filled folder for the snapshot of a branch.
        info = api.repo_info(**where, revision=self._revision(staging))
        if info.id != self.repo:
            log.warning("%s is called %s now; name that in the catalogue", self.repo, info.id)
        commit = str(info.sha)
        staging.memory["commit"] = commit
        staging.save()
        tree = api.list_repo_tree(**where, revision=commit, recursive=True)
        listed = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        patterns: dict[str, Any] = {
            "allow_patterns": list(self.include) or None,
            "ignore_patterns": [*self.exclude, *map(glob.escape, staging.consumed)],
        }
        names = list(filter_repo_objects(listed, **patterns))
        if not names and not staging.consumed:
            raise DataError(
                f"{staging.offered.name}: no file of {self.repo} matches include {list(self.include)}; it has, among "
                f"others, {', '.join(sorted(listed)[:10]) or 'none'}"
            )
        missing = [name for name in names if not (staging.files / name).is_file()]
        for part in (staging.files / ".cache").rglob("*.incomplete"):
            part.unlink()  # of a process that was killed: the library begins such a file again, under another name
        check_space(staging.files, sum(listed[name].size for name in missing), self.repo)
        staging.total = sum(listed[name].size for name in names)
        log.info("downloading %d files of %s at %s", len(missing), self.repo, commit)
        snapshot_download(**where, **patterns, revision=commit, local_dir=staging.files, endpoint=endpoint)
        _prove(staging, [listed[name] for name in names])
        return commit


def _first_line(error: Exception) -> str:
    """The library's message without its advice."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _prove(staging: Staging, files: list[Any]) -> None:
    """Compare every file with the hub's listing. Wrong ones are deleted; raises _Interrupted if there were any."""
    wrong = []
    for file in files:
        if file.path in staging.downloads:
            continue
        path = staging.files / file.path
        listed = file.lfs.sha256 if file.lfs else file.blob_id
        if path.is_file() and path.stat().st_size == file.size and _hash(path, file) == listed:
            digest = file.lfs.sha256 if file.lfs else sha256(path)
            staging.downloads[file.path] = {"size": file.size, "sha256": digest}
        else:
            path.unlink(missing_ok=True)
            wrong.append(file.path)
    staging.save()
    if wrong:
        raise _Interrupted(f"{', '.join(wrong[:5])}: not what the hub lists")


def _hash(path: Path, file: Any) -> str:
    """The hash by which the hub lists a file: sha256 of a large one, git's hash of a blob for a small one."""
    if file.lfs:
        return sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
