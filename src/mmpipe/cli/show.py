"""The plan as a tree and comparisons as tables, in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from mmpipe.artifacts.files import read_object
from mmpipe.errors import ArtifactError
from mmpipe.escapes import markup as escape
from mmpipe.estimate.stage import UTILIZATION, ResourceEstimate, bytes_per_token, estimate, total_bytes
from mmpipe.estimate.stage import warnings as hopeless_reasons
from mmpipe.plan.plan import Plan
from mmpipe.provenance import records
from mmpipe.stages.base import Precomputation


def print_plan(plan: Plan, recipe: str | None = None) -> None:
    """Print each recipe's stages with owner, data and the settings that differ from the defaults."""
    console = Console()
    references = [recipe] if recipe else plan.chosen_recipes
    hopeless: dict[str, None] = {}
    for reference in references:
        last = plan.checkpoint(reference)
        tree = Tree(f"[bold]{escape(reference)}[/]")
        for stage in last.path():
            name = reference.partition("@")[0]
            shared = "" if stage.owner == name else f" [dim](shared, made by {escape(stage.owner)})[/]"
            branch = tree.add(f"[bold]{escape(stage.name)}[/]{shared}")
            spec = json.loads(plan.spec(stage))
            for key, value in spec["settings"].items():
                branch.add(f"{escape(key)}: {escape(json.dumps(value) if not isinstance(value, str) else value)}")
            if stage.parent is None:
                model = stage.vision_language
                branch.add(f"from: {escape(' + '.join(model.parts().values()))}")
            if found := estimate(plan, stage):
                branch.add(f"[dim]estimate: {_needs(found, stage.settings.hardware.gpus)}[/]")
                hopeless |= dict.fromkeys(hopeless_reasons(plan, stage, found))
            for request in stage.settings.precomputations().values():
                if room := _room(plan, request):
                    branch.add(f"[dim]{escape(request.checkpoint)} precomputes: {room}[/]")
            branch.add(f"[dim]{escape(stage.directory() / 'model')}[/]")
        console.print(tree)
    for warning in (*plan.warnings(), *hopeless):
        console.print(f"[yellow]{escape(warning)}[/]")


def _needs(found: ResourceEstimate, gpus: int) -> str:
    """An estimate in a line."""
    size = f"{found.trainable / 1e9:.2f} of {found.parameters / 1e9:.2f} billion parameters train"
    if found.parameters < 1e8:
        size = f"{found.trainable:,} of {found.parameters:,} parameters train"
    if not gpus:
        return f"{size}, about {found.host / 1e9:.1f} GB of CPU RAM"
    hours = "unknown" if found.gpu_hours is None else f"about {found.gpu_hours:.{1 if found.gpu_hours < 10 else 0}f}"
    length = f"{found.length} tokens a sample{'' if found.measured else ' assumed'}"
    return f"{size}, about {found.memory.total / 1e9:.0f} GB a GPU ({length}), {hours} GPU-hours at {UTILIZATION:.0%} of the peak"


def _room(plan: Plan, request: Precomputation) -> str | None:
    """The disk space of precomputed log-probabilities, in a line."""
    each, total = bytes_per_token(request), total_bytes(plan, request)
    if each is None:
        return None
    in_all = f"{total / 1e9:,.2f} GB in all" if total else "how many there are is known when they are tokenised"
    return f"{each} bytes a response token, {in_all}"


def print_comparison(path: Path) -> None:
    """Print ``results/{benchmark}.json``, a row a checkpoint, controls marked; or ``results/leaderboard.json``.

    Raises ArtifactError when the file is not there, or was made from answers or checkpoints other than those that are.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: not there; make it: snakemake --cores 2 {path}")
    records.require(path.as_posix(), "what it shows")
    content = read_object(path)
    if "benchmarks" in content:
        return _print_leaderboard(content)
    table = Table(title=escape(f"{content['title']}, protocol {content['protocol']}"))
    table.add_column("checkpoint")
    for name in (escape(content["metric"]), "95 % interval", "questions"):
        table.add_column(name, justify="right")
    for row in content["rows"]:
        low, high = row["ci95"]
        table.add_row(
            escape(row["checkpoint"]),
            f"{row['score']:.3f}",
            f"{low:.3f} to {high:.3f}",
            str(row["units"]),
            style="dim" if row["control"] else None,
        )
    for row in content.get("seeds", []):
        table.add_row(
            escape(row["checkpoint"]),
            f"{row['score']:.3f} ± {row['sd']:.3f}",
            f"range {row['low']:.3f} to {row['high']:.3f}",
            f"{row['seeds']} seeds",
            style="bold",
        )
    for row in content.get("published", []):
        table.add_row(
            escape(f"{row['model']} ({row['system']})"), f"{row['score']:.3f}", "published", "", style="italic"
        )
    Console().print(table)


def _print_leaderboard(board: Mapping[str, Any]) -> None:
    table = Table(title="All benchmarks", caption="~ within noise of the best of its column")
    table.add_column("checkpoint")
    for name in (*map(escape, board["benchmarks"]), "mean", "mean rank"):
        table.add_column(name, justify="right")
    for row in board["rows"]:
        mean = "" if row["mean"] is None else f"{row['mean']:.3f}"
        cells = [_cell(row["cells"][name]) for name in board["benchmarks"]]
        table.add_row(escape(row["checkpoint"]), *cells, mean, f"{row['mean_rank']:.2f}")
    Console().print(table)


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    best = cell["against_best"]
    spread = "" if cell["sd"] is None else f" ± {cell['sd']:.3f}"
    text = f"{cell['score']:.3f}{spread}"
    if best is None:
        return f"[bold]{text}[/]"
    return f"~ {text}" if best["within_noise"] else text
