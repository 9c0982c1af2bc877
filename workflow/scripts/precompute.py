"""Precompute teacher logits or reference log-probabilities of a mixture: one chunk, or all chunks published as one."""

from pathlib import Path
from typing import Any

from mmpipe.jobs import device, mock_snakemake, offline_job, unchanged, with_progress
from mmpipe.plan.plan import Plan


@offline_job
def main(snakemake: Any, plan: Plan) -> None:
    from mmpipe.training.precompute import PrecomputeJob, precompute_chunk, publish

    wildcards = snakemake.wildcards
    wanted = plan.precomputations[f"{wildcards.teacher}/{wildcards.mixture}/{wildcards.key}"]
    folder = Path(f"resources/{wildcards.smoke}teacher", wildcards.teacher, wildcards.mixture)
    job = PrecomputeJob(
        checkpoint=Path(snakemake.input.checkpoint).parent,
        tokens=Path(snakemake.input.tokens).parent,
        spec=unchanged(snakemake, plan.precomputation_spec(wanted)),
        settings=wanted.settings,
        out=folder / wildcards.key,
        state=folder / "state" / wildcards.key,
    )
    if hasattr(snakemake.output, "manifest"):
        publish(job, [Path(path) for path in snakemake.input.chunks])
        return
    precompute_chunk(
        job,
        Path(snakemake.output[0]),
        device=device(snakemake),
        workers=plan.checkpoint(wildcards.teacher).answering.workers,
        report=lambda shards, total: with_progress(shards, total, f"{wildcards.teacher} precomputes"),
    )


if __name__ == "__main__":
    names = {"teacher": "demo@finetune", "mixture": "shapes-preferences", "key": "eaade87ef160"}
    main(globals().get("snakemake") or mock_snakemake("precompute", chunk="0000-of-0001", **names))
