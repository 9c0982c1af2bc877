"""The part of the Hugging Face hub's interface that downloading a snapshot needs, on this machine."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from urllib.parse import unquote

import faulty_server as server
from faulty_server import FaultyServer, Request

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 200
"""Files above this size are stored as the hub stores large files."""


class FakeHub:
    """One repository, ``owner/name``, whose ``main`` stands at ``commit``."""

    def __init__(self, host: FaultyServer, files: dict[str, bytes], kind: str = "datasets") -> None:
        self.host = host
        self.kind = kind
        self.private = False
        self.move(COMMIT, files)

    def move(self, commit: str, files: dict[str, bytes]) -> None:
        """Let ``main`` stand at another commit; the old one can still be had."""
        self.commit, self.files = commit, files
        api = f"/api/{self.kind}/owner/name"
        for revision in ("main", commit):
            self.host.serve(f"{api}/revision/{revision}", self._info(commit))
        self.host.serve(f"{api}/tree/{commit}?recursive=true&expand=false", self._tree(files))
        for name in files:
            self.host.serve(self.path(name), self.give(name))

    def path(self, name: str) -> str:
        """Where a file is downloaded from."""
        prefix = "" if self.kind == "models" else f"/{self.kind}"
        return f"{prefix}/owner/name/resolve/{self.commit}/{name}"

    def give(self, name: str, body: bytes | None = None) -> server.Answer:
        """A file as the hub gives it; ``body`` is a wrong content."""
        return server.content(self.files[name] if body is None else body, **self._headers(name))

    def fail(self, name: str, *faults: server.Fault) -> None:
        """Let the first requests for a file's content meet ``faults``, and later ones succeed; its head is always told."""
        honest, waiting = self.give(name), list(faults)

        def answer(request: Request) -> None:
            if request.command == "HEAD" or not waiting:
                return honest(request)
            return waiting.pop(0)(self.files[name], **self._headers(name))(request)

        self.host.serve(self.path(name), answer)

    def rename(self, old: str) -> None:
        """Let everything of the repository ``old`` lead to where it is now, as the hub does after a renaming."""
        for path in list(self.host.answers):
            moved = path.replace("owner/name", old)
            self.host.serve(moved, server.redirect(self.host.url(path), 307))

    def _headers(self, name: str) -> dict[str, str]:
        tag, size = f'"{self._etag(self.files[name])}"', str(len(self.files[name]))
        return {"etag": tag, "X_Repo_Commit": self.commit, "X_Linked_Size": size, "X_Linked_ETag": tag}

    def downloads(self) -> list[str]:
        """The files that were asked for, with content."""
        paths = [unquote(path) for path, headers in self.host.seen if "/resolve/" in path]
        return [path.rpartition(f"{self.commit}/")[2] for path in paths]

    def _info(self, commit: str) -> server.Answer:
        def answer(request: Request) -> None:
            if self.private:
                return request.send(401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository Not Found")
            return _json(request, {"id": "owner/name", "sha": commit, "siblings": [], "tags": [], "downloads": 0})

        return answer

    @staticmethod
    def _tree(files: dict[str, bytes]) -> server.Answer:
        entries = []
        for name, content in files.items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": _git(content)}
            if len(content) > LARGE:
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return lambda request: _json(request, entries)

    @staticmethod
    def _etag(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest() if len(content) > LARGE else _git(content)


def _json(request: Request, value: Any) -> None:
    request.send(200, json.dumps(value).encode(), Content_Type="application/json")


def _git(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
