"""Answer one chunk of a benchmark's questions, resuming from the answers of an interrupted run."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mmpipe.artifacts import manifest
from mmpipe.errors import ConfigError
from mmpipe.jobs import device, log, mock_snakemake, offline_job, unchanged, with_progress
from mmpipe.plan import variants
from mmpipe.plan.plan import Plan


@offline_job
def main(snakemake: Any, plan: Plan) -> None:
    from mmpipe.analysis.expert_log import merge, pieces
    from mmpipe.artifacts.state import open_state
    from mmpipe.benchmarks.base import get
    from mmpipe.benchmarks.prepare import check_images, read_questions
    from mmpipe.inference.chunks import answer_chunk, split
    from mmpipe.inference.open_answerer import open_answerer
    from mmpipe.models.moe.hooks import without_first
    from mmpipe.models.sparsity.hooks import set_keep_rate

    wildcards = snakemake.wildcards
    unchanged(snakemake, plan.benchmark_spec(wildcards.benchmark, bool(wildcards.smoke)), "reads")
    entry = plan.benchmarks[wildcards.benchmark]
    protocol = get(entry.task).protocol(entry.protocol)
    checkpoint, prepared = Path(snakemake.input.checkpoint).parent, Path(snakemake.input.benchmark).parent
    index, _, chunks = wildcards.chunk.partition("-of-")
    parts = split(read_questions(prepared, images=False), int(chunks))
    questions, start = parts[int(index)], sum(map(len, parts[: int(index)]))
    check_images(prepared, questions)
    out = Path(snakemake.output[0])
    state = out.parent.parent / "state" / wildcards.chunk
    inputs = manifest.input_hashes([checkpoint / manifest.NAME, prepared / manifest.NAME])
    logs = plan.expert_logs.spec() if hasattr(snakemake.output, "experts") else ""
    with open_state(state, manifest.fingerprint(wildcards.chunk + logs, inputs)):
        answerer = open_answerer(checkpoint, device(snakemake), model_id=wildcards.checkpoint)
        variant = variants.split(wildcards.checkpoint)[1]
        if variant:
            set_keep_rate(answerer.model, variant.keep_rate, wildcards.checkpoint)
        log.info("%d questions on %s in %s", len(questions), answerer.model.device, answerer.model.dtype)
        experts = expert_log(snakemake, plan, answerer.model, state / "experts", questions, start)

        def answers(left: Sequence[Any]) -> Iterator[Any]:
            made = answerer.answer(
                left,
                batch_size=entry.batch_size,
                max_new_tokens=entry.max_new_tokens or protocol.max_new_tokens,
                num_beams=protocol.num_beams,
                log=experts,
            )
            return with_progress(made, len(left), f"{wildcards.checkpoint} {wildcards.benchmark}")

        leaving_out = entry.control == "without_first_expert"
        with without_first(answerer.model) if leaving_out else nullcontext():
            done = answer_chunk(questions, answers, state, out, keep=experts.recover if experts else None)
        log.info("%(asked)d answered, %(resumed)d reused from an interrupted run", done)
        if experts:
            rows = merge(pieces(experts.folder), Path(snakemake.output.experts))
            log.info("%d choices of experts logged", rows)
    shutil.rmtree(state)


def expert_log(snakemake: Any, plan: Plan, model: Any, folder: Path, questions: list[Any], start: int) -> Any:
    """The log of the routers' choices where the rule declares one, else None; ``start`` indexes the first question."""
    from mmpipe.analysis.expert_log import ExpertLog

    settings = plan.expert_logs.settings
    if not hasattr(snakemake.output, "experts") or settings is None:
        return None
    if not str(snakemake.output.experts).endswith(plan.expert_logs.chunk_ending):
        raise ConfigError("log_experts changed after this job was planned; run the same command again")
    return ExpertLog(model, folder, questions, start, settings.layers)


if __name__ == "__main__":
    names = {"checkpoint": "demo", "benchmark": "mmbench", "chunk": "0000-of-0001"}
    main(globals().get("snakemake") or mock_snakemake("answer_chunk", **names))
