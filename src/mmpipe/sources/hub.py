"""Entries of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from mmpipe.errors import DataError
from mmpipe.sources.base import Source


class Hub(Source):
    """Download a repository of the hub at a pinned revision.

    The token comes from the environment (``HF_TOKEN`` or a login), never from a file of the project.
    """

    source: Literal["hub"] = "hub"
    repo: str
    """``owner/name``."""
    revision: str
    """A commit hash; a branch name would change under the results."""
    repo_type: Literal["model", "dataset"] = "model"
    include: list[str] = []
    """File patterns to download; empty for all."""
    exclude: list[str] = []
    """File patterns to leave out."""

    def fetch(self, out: Path) -> dict[str, Any]:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            snapshot_download(
                self.repo,
                revision=self.revision,
                repo_type=self.repo_type,
                allow_patterns=self.include or None,
                ignore_patterns=self.exclude or None,
                local_dir=out,
            )
        except LocalEntryNotFoundError as error:
            raise DataError(
                f"{out}: {self.repo} is not on this machine and the hub cannot be reached ({error}); "
                "run this rule on a machine with network, or use 'source: path'"
            ) from error
        except HfHubHTTPError as error:
            raise DataError(
                f"{out}: the hub refused {self.repo} at revision {self.revision} ({error}); "
                "check the names, and HF_TOKEN if the repository is gated"
            ) from error
        return {"repo": self.repo, "revision": self.revision}
