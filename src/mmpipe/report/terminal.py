"""The plan as a tree in the terminal."""

from __future__ import annotations

import json

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from mmpipe.plan import Plan


def print_plan(plan: Plan, recipe: str | None = None) -> None:
    """Print each recipe's stages with owner, data and the settings that differ from the defaults."""
    console = Console()
    references = [recipe] if recipe else plan.chosen_recipes
    for reference in references:
        last = plan.checkpoint(reference)
        tree = Tree(f"[bold]{escape(reference)}[/]")
        for stage in last.path():
            name = reference.partition("@")[0]
            shared = "" if stage.owner == name else f" [dim](shared, made by {escape(stage.owner)})[/]"
            branch = tree.add(f"[bold]{stage.name}[/]{shared}")
            spec = json.loads(plan.spec(stage))
            for key, value in spec["settings"].items():
                branch.add(f"{key}: {escape(json.dumps(value) if not isinstance(value, str) else value)}")
            if stage.parent is None:
                model = stage.vision_language
                branch.add(f"from: {escape(model.vision)} + {escape(model.language)}")
            branch.add(f"[dim]{stage.directory() / 'model'}[/]")
        console.print(tree)
    for warning in plan.warnings():
        console.print(f"[yellow]{escape(warning)}[/]")
