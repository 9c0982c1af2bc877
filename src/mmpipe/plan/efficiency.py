"""Efficiency measurements and pages of sparsified checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from mmpipe.artifacts.files import canonical_json
from mmpipe.plan.benchmarks import Evaluation
from mmpipe.plan.recipes import Recipes
from mmpipe.plan.variants import split


class Efficiency:
    """The measurements of sparsified checkpoints among the ``chosen``; empty without one."""

    def __init__(
        self, recipes: Recipes, chosen: Sequence[str], evaluation: Evaluation, keep_rates: Sequence[float]
    ) -> None:
        self._recipes = recipes
        self._keep_rates = list(keep_rates)
        bases = dict.fromkeys(split(name)[0] for name in chosen)
        self.checkpoints = [name for name in bases if recipes.checkpoint(name).sparsified]
        """The chosen checkpoints, without their variants."""
        self.benchmark = (evaluation.uncontrolled or evaluation.chosen)[0]
        """The benchmark whose prompts are measured: the first chosen one."""

    def all(self) -> list[str]:
        """Every sparsified checkpoint, chosen or not."""
        return [name for name in self._recipes.every_checkpoint() if self._recipes.checkpoint(name).sparsified]

    def spec(self) -> str:
        """What determines which numbers are measured, checkpoint and questions apart."""
        return canonical_json({"keep_rates": self._keep_rates})

    def report_items(self, out: str = "results") -> list[str]:
        """The pages about the chosen checkpoints."""
        files = ("efficiency/table.html", "efficiency/figure.svg", f"eval/{self.benchmark}/kept.html")
        return [f"{out}/{checkpoint}/{file}" for checkpoint in self.checkpoints for file in files]
