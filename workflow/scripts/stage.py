"""Run one stage of a recipe: a training, an up-cycling, or the construction of a checkpoint."""

import contextlib
import time
from pathlib import Path
from typing import Any

from mmpipe import slurm
from mmpipe.jobs import gpus, mock_snakemake, offline_job, unchanged
from mmpipe.plan.plan import Plan


@offline_job
def main(snakemake: Any, plan: Plan) -> None:
    from transformers.utils.logging import disable_progress_bar

    from mmpipe.training.run import run_stage

    disable_progress_bar()
    wildcards = snakemake.wildcards
    planned = plan.stage(wildcards.recipe, wildcards.stage)
    unchanged(snakemake, plan.spec(planned))
    run_stage(
        planned.settings,
        plan.job(
            planned,
            f"results/{wildcards.smoke}".rstrip("/"),
            threads=snakemake.threads,
            gpus=gpus(snakemake),
            hosts=hosts(snakemake),
            end_time=end_time(snakemake),
            log=Path(snakemake.log[0]),
        ),
    )


def hosts(snakemake: Any) -> tuple[str, ...]:
    """The machines of a job to which Slurm gave several; else empty."""
    slurm_job = slurm.job_id()
    if slurm_job is None or not snakemake.resources.get("mpi"):
        return ()
    found = slurm.hosts(slurm_job)
    return found if len(found) > 1 else ()


def end_time(snakemake: Any) -> float | None:
    """The end of this Slurm job's time limit, in seconds since 1970; counted from now when the controller does not answer."""
    slurm_job = slurm.job_id()
    if slurm_job is None:
        return None
    answer = slurm.end_time(slurm_job)
    with contextlib.suppress(TypeError, ValueError):
        return answer or time.time() + 60 * float(snakemake.resources.get("runtime"))
    return None


if __name__ == "__main__":
    main(globals().get("snakemake") or mock_snakemake("finetune", recipe="demo", stage="finetune"))
