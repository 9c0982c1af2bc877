"""What is measured and shown of sparsified checkpoints; plain Python, read while Snakemake plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmpipe.artifacts.files import canonical_json
from mmpipe.plan.variants import split

if TYPE_CHECKING:
    from mmpipe.plan.plan import Plan


class Savings:
    """The part of the plan that a sparsified checkpoint opens; empty without one."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        bases = dict.fromkeys(split(name)[0] for name in plan.chosen_recipes)
        self.checkpoints = [name for name in bases if plan.checkpoint(name).sparsified]
        """The chosen ones, whatever their variant."""
        asked = [name for name in plan.chosen_benchmarks if not plan.benchmarks[name].control]
        self.benchmark = next(iter(asked or plan.chosen_benchmarks))
        """The benchmark the prompts are taken from: the first that is chosen."""

    def all(self) -> list[str]:
        """Every sparsified checkpoint there is, chosen or not."""
        names = [
            name
            for recipe in self._plan.recipes
            for name in (recipe, *(f"{recipe}@{stage.name}" for stage in self._plan.stages(recipe)))
        ]
        return [name for name in names if self._plan.checkpoint(name).sparsified]

    def spec(self) -> str:
        """What determines which numbers are measured, checkpoint and questions apart."""
        return canonical_json({"keep_rates": self._plan.config.keep_rates})

    def report_items(self, out: str = "results") -> list[str]:
        """What the report shows of the chosen checkpoints."""
        files = ("efficiency/table.html", "efficiency/figure.svg", f"eval/{self.benchmark}/kept.html")
        return [f"{out}/{checkpoint}/{file}" for checkpoint in self.checkpoints for file in files]
