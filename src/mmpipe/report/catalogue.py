"""The catalogues in the terminal: what there is, from where, how large, under which licence, and what is here already."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmpipe.artifacts.files import read_json
from mmpipe.artifacts.manifest import NAME
from mmpipe.errors import ConfigError, did_you_mean
from mmpipe.fetching.space import in_words
from mmpipe.plan import Plan
from mmpipe.sources.base import Source

_COLOURS = {"fetched": "green", "manual": "yellow"}


def print_catalogue(plan: Plan, names: Iterable[str] = ()) -> None:
    """Print one line an entry, data sets first, or all that is known about the ``names``.

    Raises ConfigError for a name that is in no catalogue.
    """
    entries = {**plan.datasets, **plan.backbones}
    chosen = list(names)
    for name in chosen:
        if name not in entries:
            raise ConfigError(f"there is no data set or backbone '{name}'{did_you_mean(name, entries)}")
    console = Console()
    for name in chosen:
        console.print(_details(plan, name, entries[name]))
    if not chosen:
        console.print(_overview(plan))


def _overview(plan: Plan) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("name", "source", "state", "size", "licence", "used by"):
        table.add_column(heading, justify="right" if heading == "size" else "left", overflow="fold")
    users = _users(plan)
    for kind, entries in (("datasets", plan.datasets), ("backbones", plan.backbones)):
        for name, source in entries.items():
            state = _state(kind, name, source)
            table.add_row(
                name,
                source.kind,
                f"[{_COLOURS.get(state, 'dim')}]{state}[/]",
                _size(kind, name, source),
                escape(source.licence),
                escape(", ".join(users.get(name, []))),
            )
    return table


def _details(plan: Plan, name: str, source: Source) -> Table:
    kind = "datasets" if name in plan.datasets else "backbones"
    table = Table(title=f"[bold]{name}[/]", title_justify="left", box=None, show_header=False, pad_edge=False)
    settings: dict[str, Any] = source.model_dump(mode="json", exclude_defaults=True)
    facts = {
        "state": f"{_state(kind, name, source)}, resources/{kind}/{name}/",
        "size": _size(kind, name, source),
        **settings,
        "used by": _users(plan).get(name, []),
    }
    for key, value in facts.items():
        for line in value if isinstance(value, list) else [value]:
            table.add_row(f"[dim]{key}[/]", escape(str(line)))
            key = ""
    return table


def _manifest(kind: str, name: str) -> dict[str, Any]:
    path = Path("resources", kind, name, NAME)
    manifest: dict[str, Any] = read_json(path) if path.is_file() else {}
    return manifest


def _state(kind: str, name: str, source: Source) -> str:
    """``fetched``, ``missing``, or ``manual`` for what is missing and needs a person."""
    if _manifest(kind, name):
        return "fetched"
    return "manual" if source.kind == "manual" else "missing"


def _size(kind: str, name: str, source: Source) -> str:
    """What lies here, else about what will be fetched, else nothing."""
    manifest = _manifest(kind, name)
    parts = [*manifest.get("files", {}).values(), *manifest.get("unpacked", {}).values()]
    if parts:
        return in_words(sum(part["size"] for part in parts))
    return f"~ {source.size_gb:g} GB" if source.size_gb else ""


def _users(plan: Plan) -> dict[str, list[str]]:
    """Who reads each entry: mixtures, benchmarks, joined data sets, recipes."""
    pairs = [
        *((part.dataset, f"mixture {name}") for name, mix in plan.mixtures.items() for part in mix.parts),
        *((entry.data, f"benchmark {name}") for name, entry in plan.benchmarks.items()),
        *((need, name) for name, source in plan.datasets.items() for need in source.needs()),
        *(
            (backbone, f"recipe {stage.owner}")
            for stage in plan.stages()
            for backbone in stage.vision_language.parts().values()
        ),
    ]
    users: dict[str, list[str]] = {}
    for used, user in dict.fromkeys(pairs):
        users.setdefault(used, []).append(user)
    return users
