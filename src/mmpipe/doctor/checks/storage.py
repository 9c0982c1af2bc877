"""Disks, their file systems, and pending downloads and checkpoints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mmpipe.artifacts.files import atomic_open, sync
from mmpipe.doctor.base import Finding, Machine, ok, problem, warning
from mmpipe.errors import ConfigError, few
from mmpipe.estimate.stage import estimate
from mmpipe.sources.base import Source
from mmpipe.sources.transfer.progress import format_size


def missing_sources(machine: Machine) -> dict[str, Source]:
    """The entries that the chosen stages and benchmarks read and that are not fetched yet, by ``datasets/name`` or
    ``backbones/name``."""
    try:
        plan = machine.plan
    except ConfigError:  # reported by the check of the configuration
        return {}
    return {
        f"{kind}/{name}": getattr(plan, kind)[name]
        for kind, name in plan.fetched_sources(plan.chosen_stages(), plan.chosen_benchmarks)
        if not (machine.root / "resources" / kind / name / "manifest.json").is_file()
    }


def checkpoint_bytes(machine: Machine) -> float:
    """Bytes of the checkpoints still to be made: float32 weights of each, and for the largest one the checkpoints in
    progress (two are kept while a third is written; weights and two moments of what trains)."""
    found = [
        needs
        for stage in machine.stages
        if not (machine.root / stage.manifest()).is_file() and (needs := estimate(machine.plan, stage, machine.root))
    ]
    return sum(needs.published for needs in found) + max((3 * 12 * needs.trainable for needs in found), default=0)


_TIGHT = 10e9
"""Free bytes below which a disk is reported as nearly full."""


def check_disk(machine: Machine) -> Iterator[Finding]:
    """Free space on the disks of resources and results against the needs of the plan."""
    yield _room(machine.root, "resources", _to_fetch(machine), "what is still to be fetched")
    yield _room(machine.root, "results", checkpoint_bytes(machine), "checkpoints still to be made")


def _to_fetch(machine: Machine) -> float:
    """Bytes of missing entries whose size is known; an archive and its contents are there at the same time."""
    return sum(
        (source.size_gb or 0) * 1e9 * (2 if getattr(source, "unpack", None) else 1)
        for source in missing_sources(machine).values()
    )


def _room(root: Path, name: str, needed: float, what: str) -> Finding:
    folder = root / name
    free = shutil.disk_usage(folder if folder.is_dir() else root).free
    seen = f"{name}/: {format_size(free)} free" + (f", about {format_size(needed)} needed for {what}" if needed else "")
    link = f"free some space, or make '{name}' a link to a larger disk"
    if needed > free:
        return problem(seen, link)
    return warning(seen, link) if free - needed < _TIGHT else ok(seen)


_TRY_LOCK = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def check_file_system(machine: Machine) -> Iterator[Finding]:
    """Whether the file systems of resources and results have the locks and renames that publishing relies on."""
    for name in ("resources", "results"):
        folder = machine.root / name
        folder = next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), Path("/"))
        try:
            with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as place:
                yield _try_out(Path(place), name)
        except OSError as error:
            yield problem(
                f"{folder.absolute()} cannot be written ({error.strerror})",
                f"make it writable, or let '{name}' be a link",
            )


def _try_out(place: Path, name: str) -> Finding:
    """Lock a file against another process, and replace one by another."""
    link = f"mount it with locks (Lustre: -o flock), or let '{name}' be a link to another file system"
    with (place / "lock").open("w") as file:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return problem(f"{name}/: no file locks ({error.strerror})", link)
        command = [sys.executable, "-S", "-c", _TRY_LOCK, str(place / "lock")]
        if subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0:
            return problem(f"{name}/: two processes get the same lock", link)
    for text in ("old", "new"):
        with atomic_open(place / "file") as file_:
            file_.write(text.encode())
    sync(place)
    if (place / "file").read_text() != "new" or set(os.listdir(place)) != {"lock", "file"}:
        return problem(f"{name}/: a renamed file does not replace the old one", link)
    return ok(f"{name}/: locks and renames work")


def check_hugging_face(machine: Machine) -> Iterator[Finding]:
    """The Hugging Face hub: offline or not, with a token or not, and whether that matters. The token is never shown."""
    from huggingface_hub import constants, get_token

    wanted = [name for name, source in missing_sources(machine).items() if source.kind == "hub"]
    state = ("offline" if constants.HF_HUB_OFFLINE else "online") + (", with a token" if get_token() else ", no token")
    if os.environ.get("HF_ENDPOINT"):
        state += ", through HF_ENDPOINT"
    if constants.HF_HUB_OFFLINE and wanted:
        yield problem(
            f"{state}, but {few(wanted)} must still be fetched",
            "unset HF_HUB_OFFLINE where Snakemake runs (jobs set it themselves), or name copies with `source: path`",
        )
    elif wanted and not get_token():
        yield ok(f"{state}; to fetch: {few(wanted)}", "repositories that ask for consent need HF_TOKEN")
    else:
        yield ok(f"{state}; " + (f"to fetch: {few(wanted)}" if wanted else "nothing to fetch"))
