"""Score the answers of one checkpoint."""

from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import sha256
from mmpipe.jobs import log, mock_snakemake, offline_job, unchanged
from mmpipe.plan.plan import Plan


@offline_job
def main(snakemake: Any, plan: Plan) -> None:
    from mmpipe.benchmarks.scoring import score_files

    wildcards = snakemake.wildcards
    unchanged(snakemake, plan.benchmark_spec(wildcards.benchmark, bool(wildcards.smoke)), "reads")
    entry = plan.benchmarks[wildcards.benchmark]
    checkpoint = Path(snakemake.input.checkpoint)
    result = score_files(
        entry.task,
        [Path(snakemake.input.references)],
        [Path(snakemake.input.answers)],
        protocol=entry.protocol,
        judge=next((Path(path) for path in snakemake.input.judge), None) if entry.judge else None,
        per_item=Path(snakemake.output.per_item),
        out=Path(snakemake.output.score),
        provenance={"checkpoint": {"path": checkpoint.as_posix(), "sha256": sha256(checkpoint)}},
    )
    log.info("%s", result["metrics"])


if __name__ == "__main__":
    main(globals().get("snakemake") or mock_snakemake("score_answers", checkpoint="demo", benchmark="mmbench"))
