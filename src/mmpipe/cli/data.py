"""``mmpipe data``: the catalogues in the terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmpipe.cli.inventory import DownloadSummary, Inventory, InventoryItem
from mmpipe.errors import ConfigError, did_you_mean
from mmpipe.escapes import markup, printable
from mmpipe.plan.plan import Plan
from mmpipe.sources.transfer.progress import format_size

_COLOURS = {"fetched": "green", "partial": "cyan", "manual": "yellow"}
_NARROW = 100
"""Columns below which the kind of source is left out."""
_PIPED = 160
"""Columns without a terminal: enough for ``grep``."""
_LEGEND = (
    "[dim]! use is restricted, or terms must be accepted. `mmpipe data NAME` shows an entry in full, and what must be "
    "fetched for a mixture, a recipe or a benchmark.[/]"
)


def print_catalogue(plan: Plan, names: Iterable[str] = ()) -> None:
    """Print one line an entry, or the entries, mixtures, recipes and benchmarks of these ``names`` in full.

    Raises ConfigError for a name that is none of these.
    """
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED
    views = [view for name in names for view in _views(plan, name, console.width)]
    for view in views:
        console.print(*view(), "", sep="\n")
    if not views:
        for kind, title in (("datasets", "Data sets"), ("backbones", "Backbones")):
            found = Inventory(plan).items(kind)
            summary = DownloadSummary(tuple(one for one in found if not one.parts))
            console.print(f"[bold]{title}[/]: {_total(summary)}", _table(found, console.width), "", sep="\n")
        console.print(_LEGEND)


# --- one name ---------------------------------------------------------------------------------------------------------


def _views(plan: Plan, name: str, width: int) -> list[Callable[[], list[Any]]]:
    """The printers of everything with this name; a mixture and a data set may share one."""
    inventory = Inventory(plan)
    kinds: dict[str, tuple[Iterable[str], Callable[[], list[Any]]]] = {
        "data set": (plan.datasets, lambda: _entry(plan, inventory.item("datasets", name), width)),
        "backbone": (plan.backbones, lambda: _entry(plan, inventory.item("backbones", name), width)),
        "mixture": (plan.mixtures, lambda: [*_mixture(plan, name), *_summary(inventory.for_mixture(name), width)]),
        "recipe": (
            plan.recipes,
            lambda: [f"[bold]recipe {markup(name)}[/]", *_summary(inventory.for_recipe(name), width)],
        ),
        "benchmark": (
            plan.benchmarks,
            lambda: [
                f"[bold]benchmark {markup(name)}[/]",
                *_summary(inventory.for_datasets([plan.benchmarks[name].data]), width),
            ],
        ),
    }
    views = [view for known, view in kinds.values() if name.partition("@")[0] in known]
    if not views:
        every = {one for known, _ in kinds.values() for one in known}
        raise ConfigError(
            f"there is no data set, backbone, mixture, recipe or benchmark '{name}'{_nearest(name, every)}"
        )
    return views


def _nearest(name: str, known: set[str]) -> str:
    """Names that contain this one, or the nearest; where there are none, how to list all 200."""
    if containing := sorted(one for one in known if name in one)[:6]:
        return f"; there is {', '.join(containing)}"
    near = did_you_mean(name, known)
    return near if near.startswith("; did") else "; list them: mmpipe data, mmpipe plan, mmpipe benchmarks"


def _entry(plan: Plan, one: InventoryItem, width: int) -> list[Any]:
    settings: dict[str, Any] = one.source.model_dump(mode="json", exclude_defaults=True)
    settings.pop("how", None)  # shown as the obstacle
    facts = {
        "state": f"{one.state}, {one.directory}/",
        "size": _size(one),
        **settings,
        "licence": one.source.licence or "not stated",
        "in the way": one.obstacle,
        "used by": _users(plan).get(one.name, []),
    }
    if one.parts:
        del facts["size"], facts["licence"]
    return [f"[bold]{markup(one.name)}[/]", _facts(facts), *(_summary(one.parts, width) if one.parts else [])]


def _mixture(plan: Plan, name: str) -> list[Any]:
    mixture = plan.mixtures[name]
    known = [part.expected for part in mixture.parts if part.expected]
    rest = len(mixture.parts) - len(known)
    records = f"{sum(known):,} published" + (f", without those of {rest} parts of unknown size" if rest else "")
    facts = {"description": mixture.description, "records": records if known else ""}
    return [f"[bold]mixture {markup(name)}[/]", _facts(facts)]


def _summary(entries: Iterable[InventoryItem], width: int) -> list[Any]:
    """A table of entries and their totals."""
    summary = DownloadSummary(tuple(entries))
    facts = {
        "in all": _total(summary),
        "size unknown": ", ".join(summary.unknown),
        "licences": [f"{licence}: {', '.join(names)}" for licence, names in summary.licences.items()],
        "restricted": [f"{what}: {', '.join(names)}" for what, names in summary.restrictions.items()],
        "in the way": [f"{name}: {why}" for name, why in summary.obstacles.items()] or "nothing",
    }
    return [_table(summary.items, width), _facts(facts)]


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(entries: Iterable[InventoryItem], width: int) -> Table:
    """One line an entry at any width; the licence is cut."""
    rows = [
        {
            "name": one.name,
            "source": one.source.kind,
            "state": one.state,
            "size": _size(one),
            "records": f"{one.source.records:,}" if one.source.records else "",
        }
        for one in entries
    ]
    if width < _NARROW:
        rows = [{name: cell for name, cell in row.items() if name != "source"} for row in rows]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name in rows[0] if rows else ():
        longest = max(len(text) for text in (name, *(row[name] for row in rows)))
        justify: Any = "right" if name in ("size", "records") else "left"
        table.add_column(name, justify=justify, no_wrap=True, min_width=longest)
    table.add_column("licence")
    for one, row in zip(entries, rows, strict=True):
        row["state"] = f"[{_COLOURS.get(one.state, 'dim')}]{one.state}[/]"
        table.add_row(markup(row.pop("name")), *row.values(), _terms(one))
    return table


def _facts(facts: Mapping[str, Any]) -> Table:
    """Facts by name, one per line, empty ones left out."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        for line in value if isinstance(value, list) else [value] if value not in ("", None) else []:
            table.add_row(f"[dim]{markup(key)}[/]", markup(line))
            key = ""
    return table


def _terms(one: InventoryItem) -> Text:
    """The licence in a line, marked where it restricts; a joined data set has those of its parts."""
    line = partial(Text, no_wrap=True, overflow="ellipsis")
    if one.parts:
        return line(f"{len(one.parts)} parts", style="dim")
    if not one.source.licence:
        return line("" if one.source.kind == "made" else "not stated", style="dim")
    if one.source.restricted:
        return line(f"! {printable(one.source.licence, line=True)}", style="yellow")
    return line(printable(one.source.licence, line=True))


def _size(one: InventoryItem) -> str:
    """Local of announced bytes; ``?`` when unknown."""
    if one.parts:
        summary = DownloadSummary(one.parts)
        return f"{'> ' if summary.unknown else ''}{format_size(summary.bytes_here + summary.to_fetch)}"
    if one.here or (one.bytes_here and one.announced is None):
        return format_size(one.bytes_here)
    if one.announced is None:
        return "?"
    whole = f"~ {format_size(one.announced)}" if one.announced else ""
    return f"{format_size(one.bytes_here)} of {whole}" if one.bytes_here else whole


def _total(summary: DownloadSummary) -> str:
    """``14 entries, 3 of them here (20.1 GB), 81.0 GB to fetch and 2 of unknown size``."""
    text = f"{len(summary.items)} entries, {sum(entry.here for entry in summary.items)} of them here"
    text += f" ({format_size(summary.bytes_here)})" if summary.bytes_here else ""
    if summary.to_fetch or summary.unknown:
        text += f", {format_size(summary.to_fetch)} to fetch"
        text += f" and {len(summary.unknown)} of unknown size" if summary.unknown else ""
    return text


def _users(plan: Plan) -> dict[str, list[str]]:
    """The readers of each entry: mixtures, benchmarks, joined data sets, recipes."""
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
