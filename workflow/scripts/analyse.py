"""Compute and draw one family of expert metrics."""

from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import write_csv
from mmpipe.jobs import device, mock_snakemake, offline_job
from mmpipe.plan.plan import Plan


@offline_job
def main(snakemake: Any, plan: Plan) -> None:
    from mmpipe.analysis.base import MetricInput, draw

    logs = plan.expert_logs
    family = logs.families[snakemake.wildcards.family]
    sources = [MetricInput.of(path) for path in snakemake.input]
    if family.runs_model:
        assert logs.settings is not None
        rows = family.measure(sources, device(snakemake), logs.settings.similarity_questions)
    else:
        rows = family.table(sources)
    write_csv(Path(snakemake.output.table), rows)
    draw(family, rows, Path(snakemake.output.figure))


if __name__ == "__main__":
    configfiles = ["config/demo-libmoe.yaml"]
    names = {"checkpoint": "demo-libmoe-topk-0", "benchmark": "mmbench", "family": "balance"}
    main(globals().get("snakemake") or mock_snakemake("analyse_answers", configfiles=configfiles, **names))
