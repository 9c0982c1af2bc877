"""Compare the chosen checkpoints on one benchmark, or rank them over all benchmarks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import read_json, read_jsonl, write_csv, write_json
from mmpipe.jobs import mock_snakemake, offline_job, unchanged
from mmpipe.plan.plan import Plan


@offline_job
def main(snakemake: Any, plan: Plan) -> None:
    out = Path(snakemake.output.json)
    if hasattr(snakemake.output, "csv"):
        unchanged(snakemake, plan.ranking_spec(), "reads")
        board, table = ranking(plan, out.parent)
        write_json(out, board)
        write_csv(Path(snakemake.output.csv), table)
    else:
        name = snakemake.wildcards.benchmark
        unchanged(snakemake, plan.comparison_spec(name), "reads")
        published = json.loads(unchanged(snakemake, plan.published(name), "published"))
        write_json(out, comparison(plan, name, out.parent, published))


def comparison(plan: Plan, name: str, out: Path, published: list[dict[str, Any]]) -> dict[str, Any]:
    """``results/{benchmark}.json``: checkpoints, their controls (marked in brackets) and published results."""
    from mmpipe.benchmarks.compare import compare
    from mmpipe.benchmarks.published import beside

    def scores(benchmark: str, mark: str = "") -> dict[str, Any]:
        return {
            f"{checkpoint}{mark}": read_json(out / checkpoint / "eval" / benchmark / "score.json")
            for checkpoint in plan.chosen_recipes
        }

    marks = {control: f" ({plan.benchmarks[control].control})" for control in plan.controls(name)}
    controls = {key: value for control, mark in marks.items() for key, value in scores(control, mark).items()}
    family = {f"{c}{mark}": f"{plan.family(c)}{mark}" for c in plan.chosen_recipes for mark in ("", *marks.values())}
    compared = {"title": plan.benchmarks[name].title or name, **compare(name, scores(name), controls, family=family)}
    return {**compared, "published": beside(compared, published)}


def ranking(plan: Plan, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """``results/leaderboard.json`` and the rows of ``leaderboard.csv``."""
    from mmpipe.benchmarks.leaderboard import as_table, leaderboard

    def of_each(read: Callable[[Path], Any], file: str) -> dict[str, dict[str, Any]]:
        return {
            benchmark: {
                checkpoint: read(out / checkpoint / "eval" / benchmark / file) for checkpoint in plan.chosen_recipes
            }
            for benchmark in plan.compared_benchmarks
        }

    family = {checkpoint: plan.family(checkpoint) for checkpoint in plan.chosen_recipes}
    board = leaderboard(of_each(read_json, "score.json"), of_each(read_jsonl, "per_item.jsonl"), family)
    return board, as_table(board)


if __name__ == "__main__":
    main(globals().get("snakemake") or mock_snakemake("compare", benchmark="mmbench"))
