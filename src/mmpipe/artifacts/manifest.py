"""The manifest of an artifact: its kind, its inputs, and the hash of every file.

A manifest is deterministic: a rebuild from the same inputs writes the same bytes, so that steps
downstream stay current. Values that vary from run to run (times, host) belong into ``perf.json``.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic cannot read typing's before Python 3.12

from mmpipe import __version__
from mmpipe.artifacts import hashes
from mmpipe.artifacts.files import canonical_json, leaves_folder, read_json, read_object, sha256, write_json
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
    return {path.as_posix(): hashes.digest(path) for path in sorted(manifests)}


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


def read(directory: Path, *, hashed: bool = True) -> dict[str, Any]:
    """Read a directory's manifest and check the files it lists: their sizes and, with ``hashed``, their hashes where it
    has them. Raises ArtifactError naming the first file that is missing, cut or damaged."""
    path = directory / NAME
    if not path.is_file():
        raise ArtifactError(f"{directory}: no {NAME}; the artifact was never finished: snakemake {path}")
    manifest = load(path)
    _require(faults(directory, manifest["files"], hashed=hashed))
    return manifest


def faults(
    directory: Path, files: Mapping[str, Mapping[str, Any]], *, hashed: bool = True, cache: bool = True
) -> Iterator[str]:
    """What is wrong with ``files`` of a manifest, a sentence for each that is missing, cut or damaged. Contents are
    compared with ``hashed``; ``cache=False`` reads them in any case."""
    remedy = (
        f"restore the file from a copy, or delete {directory / NAME} and make all again: snakemake {directory / NAME}"
    )
    whole = {}
    for name, facts in files.items():
        file = directory / name
        size = file.stat().st_size if file.is_file() else None
        if size == facts["size"]:
            whole[file] = facts.get("sha256")
        else:
            there = "missing" if size is None else f"{size} bytes"
            yield f"{file}: {there}, but {directory / NAME} lists {facts['size']} bytes; {remedy}"
    listed = {file: digest for file, digest in whole.items() if digest is not None and hashed}
    differing = [file for file, digest in hashes.digests(listed, cache=cache).items() if digest != listed[file]]
    for file, found in hashes.digests(differing, cache=False).items():  # a damaged cache must not condemn a file
        if found != listed[file]:
            what = f"the content has the sha256 {found}" if found else "cannot be read"
            yield f"{file}: damaged or changed: {what}, but {directory / NAME} lists {listed[file]}; {remedy}"


def check(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Check the hash of a file, or of the files below a directory, against the manifest of the artifact that they are
    part of; ``wanted`` selects by their names in it. Files of no artifact are not checked. Raises ArtifactError naming
    file, expected and found hash."""
    directory, files = _listed(path, wanted)
    _require(faults(directory, files))


def check_all(directory: Path) -> None:
    """:func:`check` of an artifact and of those that are read with it: the base of a projector, joined data sets."""
    check(directory)
    for other in _read_with(directory):
        check_all(other)


@contextmanager
def checking(path: Path) -> Iterator[None]:
    """:func:`check` in the background while the files are read: large ones are hashed meanwhile, and the error is raised
    at the end, or in place of the one that reading damaged files raised."""
    directory, files = _listed(path)
    large = {name: facts for name, facts in files.items() if facts["size"] >= hashes.SMALL}
    _require(faults(directory, {name: facts for name, facts in files.items() if name not in large}))
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(lambda: _require(faults(directory, large)))
        try:
            yield
        except Exception:
            checked.result()
            raise
        checked.result()


def artifact_of(path: Path) -> Path | None:
    """The artifact that a file or a directory is part of: the nearest directory with a manifest that lists it."""
    return next((folder for folder in (path, *path.parents) if _files(folder, path)), None)


def _listed(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> tuple[Path, dict[str, Mapping[str, Any]]]:
    directory = artifact_of(path)
    if directory is None:
        return path, {}
    return directory, {name: facts for name, facts in _files(directory, path).items() if wanted(name)}


def _files(directory: Path, path: Path) -> dict[str, Mapping[str, Any]]:
    """The files at or below ``path`` that the manifest of ``directory`` lists; none without one."""
    if not (directory / NAME).is_file():
        return {}
    try:
        files = load(directory / NAME)["files"]
    except ArtifactError:
        if directory == path:
            raise
        return {}
    below = path.relative_to(directory).as_posix()
    return {name: facts for name, facts in files.items() if below in (".", name) or name.startswith(f"{below}/")}


def _read_with(directory: Path) -> list[Path]:
    if not (directory / NAME).is_file():
        return []
    card = load(directory / NAME)
    facts = card.get("checkpoint", {}) if card["kind"] == "projector" else {}
    joined = [Path(path).parent for path in card["inputs"]] if card["kind"] == "source" else []
    base = [facts["base"]] if "base" in facts else []
    return [*map(Path, [*base, *facts.get("backbones", {}).values()]), *joined]


def _require(found: Iterator[str]) -> None:
    if (fault := next(found, None)) is not None:
        raise ArtifactError(fault)
