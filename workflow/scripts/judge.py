"""Let the judge grade the answers, resuming from the replies of an interrupted run."""

from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import atomic_open
from mmpipe.errors import ConfigError
from mmpipe.jobs import job, log, mock_snakemake, unchanged
from mmpipe.plan.plan import Plan


@job
def main(snakemake: Any, plan: Plan) -> None:
    from mmpipe.benchmarks.judge import judge_answers

    name = snakemake.wildcards.benchmark
    entry = plan.benchmarks[name]
    if entry.judge is None:
        raise ConfigError(f"{name}: no judge is configured; give the entry a 'judge'")
    unchanged(snakemake, plan.judge_spec(name))
    out = Path(snakemake.output[0])
    progress = out.parent / "state" / "judge.jsonl"
    references, answers = Path(snakemake.input.references), Path(snakemake.input.answers)
    log.info("%s", judge_answers(entry.task, [references], [answers], progress, entry.judge))
    with atomic_open(out) as file:
        file.write(progress.read_bytes())


if __name__ == "__main__":
    main(globals().get("snakemake") or mock_snakemake("judge_answers", checkpoint="demo", benchmark="mmbench"))
