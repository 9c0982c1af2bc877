"""The record of how a file was made, kept below ``.mmpipe`` in the folder of results, so that it travels with them.

A record is JSON: the fields of Snakemake's own metadata, and

* ``plan``: hashes of what the configuration made of the job (``""``) and of each of its inputs, by path;
* ``input_checksums``: the content of the inputs when the job started;
* ``output_checksum``: the content of the file;
* ``temporary``: whether Snakemake deletes the file when it is no longer needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import read_json, write_json
from mmpipe.artifacts.hashes import digest
from mmpipe.errors import ArtifactError

HOME = ".mmpipe"
RECORDS = "records"
ORDERS = "orders"


def place(path: str, kind: str) -> Path | None:
    """Where the record (or another ``kind`` of note) of an output is; None outside of folders of the workflow.

    >>> place("results/demo/eval/pope/score.json", RECORDS).as_posix()
    'results/.mmpipe/records/demo/eval/pope/score.json.json'
    """
    root, _, rest = path.partition("/")
    if not root or not rest or ".." in rest.split("/"):
        return None
    return Path(f"{root}/{HOME}/{kind}/{rest}.json")


def read(path: str, kind: str = RECORDS) -> dict[str, Any]:
    """The record of an output; empty without one, or when it was cut while it was written."""
    found = place(path, kind)
    try:
        content = read_json(found) if found else {}
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def write(path: str, content: dict[str, Any], kind: str = RECORDS) -> None:
    """Write the record of an output atomically."""
    if found := place(path, kind):
        write_json(found, content)


def delete(path: str, kind: str = RECORDS) -> bool:
    """Remove the record of an output; whether there was one."""
    found = place(path, kind)
    if found is None or not found.is_file():
        return False
    found.unlink()
    return True


def checksum(path: str | Path) -> str | None:
    """``sha256:`` and the digest of a file; None for a folder or without the file."""
    path = Path(path)
    return f"sha256:{digest(path)}" if path.is_file() else None


def changed_inputs(checksums: dict[str, str]) -> Iterator[str]:
    """Each input that is another one than at the time of the record; inputs that are not there are not judged."""
    for path, recorded in checksums.items():
        now = checksum(path)
        if now is not None and now != recorded:
            yield f"{path} is another one than it was made from ({_short(recorded)} then, {_short(now)} now)"


def changed_output(path: str, record: dict[str, Any]) -> str | None:
    """How a file differs from what its record says; None when it does not, or nothing is recorded."""
    recorded, now = record.get("output_checksum"), checksum(path)
    if recorded is None or now is None or recorded == now:
        return None
    return f"{path} is not what was written ({_short(recorded)} then, {_short(now)} now)"


def changed_artifact(directory: Path, spec: str | None = None) -> str | None:
    """How a published artifact differs from what would be made: other settings than ``spec``, or made from other inputs
    than there are. None when its manifest proves it; damage of the files is not looked for."""
    path = directory / manifest.NAME
    try:
        found = read_json(path)
        made, inputs = found["spec"], {name: f"sha256:{digest}" for name, digest in found["inputs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{path} cannot be read"
    if spec is not None and made != json.loads(spec):
        return f"{path} was made with other settings{_difference(made, json.loads(spec))}"
    return next(changed_inputs(inputs), None)


def published(outputs: Iterable[str]) -> Path | None:
    """The directory of the manifest among ``outputs``, where it is on the disk."""
    manifests = (Path(output) for output in outputs if Path(output).name == manifest.NAME)
    return next((path.parent for path in manifests if path.is_file()), None)


def _difference(made: Any, wanted: Any) -> str:
    """The first settings that differ, by name."""
    before, after = (dict(flat(value)) for value in (made, wanted))
    differing = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    shown = [f"{name}: {before.get(name, '(default)')} -> {after.get(name, '(default)')}" for name in differing[:3]]
    return f" ({', '.join(shown)}{', ...' if len(differing) > 3 else ''})" if shown else ""


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of nested mappings under dotted names.

    >>> dict(flat({"a": {"b": 1}, "c": 2}))
    {'a.b': 1, 'c': 2}
    """
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))


def _short(checksum: str) -> str:
    return checksum.partition(":")[2][:12]


def doubts(path: str) -> list[str]:
    """Why a file may not be of what is on the disk, in words: it or what it was made from was changed, or a checkpoint or
    answers are gone.

    Follows the records from the file to the checkpoints and the questions it was made from; temporary files are passed
    over for what they were made from. Empty when everything is equal, as far as it was recorded.
    """
    found: dict[str, None] = {}
    seen: set[str] = set()

    def follow(path: str) -> None:
        record, here = read(path), Path(path).exists()
        if not here and not record.get("temporary"):
            if path.startswith("results/"):
                found[f"{path} is not there"] = None
            return
        if why := here and changed_output(path, record):
            found[why] = None
        inputs = record.get("input_checksums") or {}
        found.update(dict.fromkeys(changed_inputs(inputs)))
        for inner in sorted(inputs.keys() - seen):
            seen.add(inner)
            # what a published artifact was made from may be gone: its manifest names it
            if Path(inner).name != manifest.NAME or not Path(inner).exists():
                follow(inner)

    follow(path)
    return list(found)


def require(path: str, what: str) -> None:
    """Raises ArtifactError where :func:`doubts` finds one."""
    if reasons := doubts(path):
        raise ArtifactError(
            f"{path}: {what} is of something else than what is here: {'; '.join(reasons[:3])}; make it again: "
            f"snakemake --cores 2 {path}"
        )
