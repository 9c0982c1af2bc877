"""The manifest of an artifact: its kind, its inputs, and the hash of every file.

A manifest is deterministic: a rebuild from the same inputs writes the same bytes, so that steps
downstream stay current. Values that vary from run to run (times, host) belong into ``perf.json``.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic cannot read typing's before Python 3.12

from mmpipe import __version__
from mmpipe.artifacts.files import canonical_json, leaves_folder, read_json, read_object, sha256, write_json
from mmpipe.artifacts.hashes import digest
from mmpipe.errors import ArtifactError, ConfigError
from mmpipe.settings import validate

NAME = "manifest.json"
SCHEMA = 1
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "datasets", "numpy", "pillow")


def fingerprint(spec: str, inputs: Mapping[str, str]) -> str:
    """Hash that determines a step's result, of its spec and its inputs' manifests."""
    return hashlib.sha256(canonical_json({"spec": spec, "inputs": dict(inputs)}).encode()).hexdigest()


def input_hashes(manifests: list[Path]) -> dict[str, str]:
    """The sha256 of each input manifest by its path. Raises ArtifactError when one is missing."""
    for path in manifests:
        if not path.is_file():
            raise ArtifactError(f"{path}: the manifest is missing; ask snakemake for it: snakemake {path}")
    return {path.as_posix(): digest(path) for path in sorted(manifests)}


def read_inputs(directory: Path) -> dict[str, str]:
    """The sha256 of each manifest that an artifact was made from, by path; empty when the artifact's is damaged."""
    try:
        return dict(read_json(directory / NAME)["inputs"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that can change a number."""
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def write(
    directory: Path,
    *,
    kind: str,
    spec: str,
    inputs: Mapping[str, str],
    hash_files: bool = True,
    files: Mapping[str, Mapping[str, Any]] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Write ``manifest.json`` for all files below ``directory`` and return it. ``facts`` are further deterministic
    values (seed, steps, tokens seen, counts). ``hash_files=False`` records sizes alone, for adopted trees. ``files`` is
    the list itself, where the caller knows it."""
    if files is None:
        paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != NAME]
        sizes = {path: {"size": path.stat().st_size} for path in paths}
        hashes = {path: {"sha256": sha256(path)} if hash_files else {} for path in paths}
        files = {path.relative_to(directory).as_posix(): sizes[path] | hashes[path] for path in paths}
    manifest = {
        "schema": SCHEMA,
        "kind": kind,
        "spec": json.loads(spec),
        "inputs": dict(inputs),
        **facts,
        "mmpipe": __version__,
        "libraries": library_versions(),
        "files": dict(files),
    }
    write_json(directory / NAME, manifest)
    return manifest


class _File(TypedDict):
    size: Annotated[int, Field(ge=0)]
    sha256: NotRequired[str]


class _Unpacked(TypedDict):
    size: Annotated[int, Field(ge=0)]
    archives: dict[str, _File]


class _Checkpoint(TypedDict):
    template: str
    image_aspect: str
    base: NotRequired[str]
    backbones: NotRequired[dict[str, str]]


class _Manifest(TypedDict):
    """What readers rely on; a manifest may hold more."""

    kind: str
    spec: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, _File]
    libraries: NotRequired[dict[str, str]]
    recipe: NotRequired[str]
    stage: NotRequired[str]
    checkpoint: NotRequired[_Checkpoint]
    unpacked: NotRequired[dict[str, _Unpacked]]
    below: NotRequired[_File]
    settings: NotRequired[dict[str, Any]]
    vocabulary: NotRequired[int]
    tokenizer: NotRequired[str]
    pixels: NotRequired[dict[str, Any]]


def load(path: Path) -> dict[str, Any]:
    """Read a manifest, its files unchecked. Raises ArtifactError when it is damaged: no JSON, or of another shape."""
    content = read_object(path)
    try:
        validate(_Manifest, content, str(path))
    except ConfigError as error:
        raise ArtifactError(
            f"{error}\nThe manifest is damaged; delete it and make it again: snakemake {path}"
        ) from error
    if outside := [name for name in content["files"] if leaves_folder(name)]:
        raise ArtifactError(f"{path}: the manifest lists a file outside its folder: {outside[0]!r}")
    return content


def read(directory: Path) -> dict[str, Any]:
    """Read a directory's manifest and check that the files it lists are there in full size. Raises ArtifactError naming
    the first file that is missing or cut."""
    path = directory / NAME
    if not path.is_file():
        raise ArtifactError(f"{directory}: no {NAME}; the artifact was never finished: snakemake {path}")
    manifest = load(path)
    for name, facts in manifest["files"].items():
        file = directory / name
        size = file.stat().st_size if file.is_file() else None
        if size != facts["size"]:
            found = "missing" if size is None else f"{size} bytes"
            raise ArtifactError(
                f"{file}: {found}, but {path} lists {facts['size']} bytes; delete the manifest to make it again"
            )
    return manifest
