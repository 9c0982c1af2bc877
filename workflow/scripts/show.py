"""Write a page or a figure of the report, chosen by the rule's name."""

from pathlib import Path
from typing import Any

from mmpipe.jobs import mock_snakemake, offline_job
from mmpipe.plan.plan import Plan


@offline_job
def main(snakemake: Any, plan: Plan) -> None:
    from mmpipe.report import figures, pages

    source, out = Path(snakemake.input[0]), Path(snakemake.output[0])
    match snakemake.rule:
        case "show_training":
            figures.draw_history(source, out)
        case "show_checkpoint":
            pages.settings_page(source, out)
        case "show_samples":
            pages.samples_page(source.parent, Path(snakemake.input.answers), Path(snakemake.input.per_item), out)
        case "show_efficiency":
            pages.efficiency_page(source, out)
            figures.draw_efficiency(source, Path(snakemake.output.figure))
        case rule:
            pages.table_page(rule.removeprefix("show_"), source, out)


if __name__ == "__main__":
    main(globals().get("snakemake") or mock_snakemake("show_comparison", benchmark="mmbench"))
