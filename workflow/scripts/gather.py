"""Join the chunks of answers, after checking that they are complete, or the chunks of an expert log."""

from pathlib import Path
from typing import Any

from mmpipe.jobs import log, mock_snakemake, offline_job, unchanged
from mmpipe.plan.plan import Plan


@offline_job
def main(snakemake: Any, plan: Plan) -> None:
    from mmpipe.analysis.expert_log import merge
    from mmpipe.benchmarks.prepare import read_questions
    from mmpipe.inference.chunks import gather

    out = Path(snakemake.output[0])
    if out.suffix == ".parquet":
        unchanged(snakemake, plan.expert_logs.spec())
        log.info("%d choices of experts", merge([Path(path) for path in snakemake.input], out))
    else:
        questions = read_questions(Path(snakemake.input.questions).parent, images=False)
        log.info("%d answers", gather(questions, [Path(path) for path in snakemake.input.chunks], out))


if __name__ == "__main__":
    main(globals().get("snakemake") or mock_snakemake("gather_answers", checkpoint="demo", benchmark="mmbench"))
