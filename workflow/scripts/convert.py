"""Write the answers of one checkpoint in the format that the benchmark's server accepts."""

from pathlib import Path
from typing import Any

from mmpipe.jobs import log, mock_snakemake, offline_job, unchanged
from mmpipe.plan.plan import Plan


@offline_job
def main(snakemake: Any, plan: Plan) -> None:
    from mmpipe.benchmarks.scoring import convert_files

    wildcards = snakemake.wildcards
    unchanged(snakemake, plan.benchmark_spec(wildcards.benchmark, bool(wildcards.smoke)), "reads")
    task = plan.benchmarks[wildcards.benchmark].task
    references, answers = Path(snakemake.input.references), Path(snakemake.input.answers)
    log.info("%s", convert_files(task, [references], [answers], Path(snakemake.output[0])))


if __name__ == "__main__":
    names = {"checkpoint": "demo", "benchmark": "mmbench", "extension": "xlsx"}
    main(globals().get("snakemake") or mock_snakemake("convert_submission", **names))
