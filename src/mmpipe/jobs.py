"""What the rule scripts call: each function takes Snakemake's ``snakemake`` object and does one job.

An error that the user can mend is printed without a traceback, to the terminal and to the job's log, and ends the job
with status 1.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

from mmpipe import slurm
from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import atomic_open, read_json, sha256, staged_directory, write_csv, write_json
from mmpipe.benchmarks.base import get
from mmpipe.errors import ConfigError, MmpipeError, explained
from mmpipe.plan import variants
from mmpipe.plan.plan import Plan

log = logging.getLogger("mmpipe")


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    for chatty in ("httpx", "matplotlib", "datasets", "torch", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def job(function: Callable[[Any, Plan], None]) -> Callable[[Any], None]:
    """Wrap a job: open the log, read the plan, respect the threads and GPUs, print errors for people."""

    @wraps(function)
    def run(snakemake: Any) -> None:
        from mmpipe.gpu_locks import locked_gpus

        # the shell around this process ignores SIGTERM, and what is ignored is inherited
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.setdefault("OMP_NUM_THREADS", str(snakemake.threads))
        with _logging_to(Path(snakemake.log[0])):
            try:
                with locked_gpus(_gpus(snakemake)):
                    function(snakemake, Plan(snakemake.config))
            except MmpipeError as error:
                log.error("%s", error)
                print(f"mmpipe: {error}", file=sys.stderr)
                raise SystemExit(1) from None
            except OSError as error:
                log.exception("the operating system refused")
                print(f"mmpipe: {explained(error)}", file=sys.stderr)
                raise SystemExit(1) from None
            except Exception as error:
                log.exception("unexpected failure: %s", explained(error))
                raise

    return run


def offline_job(function: Callable[[Any, Plan], None]) -> Callable[[Any], None]:
    """A job that computes: what it needs was fetched before, and it must not look for anything on the network."""

    @wraps(function)
    def run(snakemake: Any) -> None:
        # before any of these libraries is imported
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
        job(function)(snakemake)

    return run


def _gpus(snakemake: Any) -> int:
    """GPUs the job was given in all, however they were asked for."""
    resources = snakemake.resources
    per_node = re.match(r"gpu(?::[^:]+)?:(\d+)$", str(resources.get("gres", "")))
    if per_node:
        return int(per_node[1]) * int(resources.get("nodes", 1))
    return int(resources.get("gpu", 0))


def _hosts(snakemake: Any) -> tuple[str, ...]:
    """The machines of a job that Slurm gave several."""
    slurm_job = slurm.job_id()
    if slurm_job is None or not snakemake.resources.get("mpi"):
        return ()
    found = slurm.hosts(slurm_job)
    return found if len(found) > 1 else ()


def _end_time(snakemake: Any) -> float | None:
    """When this Slurm job's time is up; counted from now when the controller does not answer."""
    slurm_job = slurm.job_id()
    if slurm_job is None:
        return None
    answer = slurm.end_time(slurm_job)
    with contextlib.suppress(TypeError, ValueError):
        return answer or time.time() + 60 * float(snakemake.resources.get("runtime"))
    return None


def _quiet_transformers() -> None:
    """No bars for loading weights: they would stand between the lines that matter."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _unchanged(snakemake: Any, spec: str, parameter: str = "spec") -> str:
    """The spec, after checking that the configuration still says what it said when the job was planned."""
    if getattr(snakemake.params, parameter) != spec:
        raise ConfigError(
            f"{snakemake.output[0]}: the configuration changed after this job was planned; run the same command again"
        )
    return spec


@job
def fetch(snakemake: Any, plan: Plan) -> None:
    """Bring a backbone or a data set onto this machine."""
    from mmpipe.sources.transfer.lock import locked

    catalogue, name = next(iter(snakemake.wildcards.items()))
    kind = f"{catalogue}s"
    source = getattr(plan, kind)[name]
    spec = _unchanged(snakemake, plan.source_spec(source))
    out = Path(snakemake.output.manifest).parent
    needed = [Path("resources/datasets", need, manifest.NAME) for need in source.needs()]
    facts = source.fetch(out, locked(kind, name))
    manifest.write(out, kind="source", spec=spec, inputs=manifest.input_hashes(needed), **facts)


def _failed_report(snakemake: Any) -> Path:
    """Where the report of a job goes that found too many faults to publish: beside its log, which outlives it."""
    return Path(snakemake.log[0]).with_suffix(".report.json")


@offline_job
def mix(snakemake: Any, plan: Plan) -> None:
    """Verify the records of a mixture and write them in one file."""
    from mmpipe.data.mixture import build_mixture

    mixture = plan.mixtures[snakemake.wildcards.mixture]
    spec = _unchanged(snakemake, plan.mixture_spec(snakemake.wildcards.mixture))
    datasets = {part.dataset: Path("resources/datasets", part.dataset) for part in mixture.parts}
    inputs = manifest.input_hashes([path / manifest.NAME for path in datasets.values()])
    out = Path(snakemake.output.manifest).parent
    with staged_directory(out) as stage:
        report = build_mixture(
            mixture,
            datasets,
            stage,
            workers=snakemake.threads,
            log=log.info,
            published=out,
            failed_report=_failed_report(snakemake),
        )
        manifest.write(stage, kind="mixture", spec=spec, inputs=inputs, records=report["kept"])


@offline_job
def check_overlap(snakemake: Any, plan: Plan) -> None:
    """Count the images of the benchmarks that a mixture holds."""
    from mmpipe.benchmarks.contamination import overlap

    benchmarks = {Path(path).parent.name: Path(path).parent for path in snakemake.input.benchmarks}
    found = overlap(Path(snakemake.input.mixture).parent, benchmarks)
    for name, facts in found["benchmarks"].items():
        if facts["shared_images"]:
            log.warning("%s: %d images are also trained on", name, facts["shared_images"])
    write_json(Path(snakemake.output.report), found)


@offline_job
def tokenise(snakemake: Any, plan: Plan) -> None:
    """Encode a mixture as one model's tokenizer and template write it."""
    from mmpipe.checkpoints.load import load_tokenizer
    from mmpipe.data.templates import get_template
    from mmpipe.data.tokens import TextEncoder, tokenise
    from mmpipe.models.llava import IMAGE_TOKEN

    wildcards = snakemake.wildcards
    wanted = plan.tokens[f"{wildcards.mixture}/{wildcards.key}"]
    spec = _unchanged(snakemake, wanted.spec())
    inputs = wanted.inputs()
    tokenizer, image_tokens = load_tokenizer(wanted.directories, wanted.vision_language, wanted.layouts)
    encoder = TextEncoder(
        template=get_template(wanted.encoding.template, tokenizer),
        tokenizer=tokenizer,
        image_token=IMAGE_TOKEN,
        tokens_per_image=image_tokens,
        max_length=wanted.encoding.max_length,
    )
    with staged_directory(Path(snakemake.output.manifest).parent) as staged:
        report = tokenise(
            inputs["mixture"].parent / "records.arrow",
            encoder,
            staged,
            max_bad=plan.mixtures[wildcards.mixture].max_bad,
            workers=snakemake.threads,
            log=log.info,
            failed_report=_failed_report(snakemake),
        )
        hashes = manifest.input_hashes(list(inputs.values()))
        manifest.write(staged, kind="tokens", spec=spec, inputs=hashes, records=report["kept"])


@offline_job
def stage(snakemake: Any, plan: Plan) -> None:
    """Run one stage of a recipe."""
    from mmpipe.training.run import run_stage

    wildcards = snakemake.wildcards
    planned = plan.stage(wildcards.recipe, wildcards.stage)
    _quiet_transformers()
    _unchanged(snakemake, plan.spec(planned))
    run_stage(
        planned.settings,
        plan.job(
            planned,
            f"results/{wildcards.smoke}".rstrip("/"),
            threads=snakemake.threads,
            gpus=_gpus(snakemake),
            hosts=_hosts(snakemake),
            end_time=_end_time(snakemake),
            log=Path(snakemake.log[0]),
        ),
    )


@offline_job
def annotate(snakemake: Any, plan: Plan) -> None:
    """Let a checkpoint write down what it says about one chunk of a mixture, going on from what an interrupted run left."""
    import torch

    from mmpipe.training.precompute import precompute_chunk

    torch.set_num_threads(snakemake.threads)
    _quiet_transformers()
    wildcards = snakemake.wildcards
    precompute_chunk(
        _annotation_work(snakemake, plan),
        Path(snakemake.output[0]),
        device=_device(snakemake),
        workers=plan.checkpoint(wildcards.annotator).answering.workers,
        report=lambda shards, total: _with_progress(shards, total, f"{wildcards.annotator} annotates"),
    )


@offline_job
def gather_annotations(snakemake: Any, plan: Plan) -> None:
    """Publish what all chunks of a mixture were annotated with."""
    from mmpipe.training.precompute import publish

    publish(_annotation_work(snakemake, plan), [Path(path) for path in snakemake.input.chunks])


def _annotation_work(snakemake: Any, plan: Plan) -> Any:
    """What a job annotates."""
    from mmpipe.training.precompute import PrecomputeJob

    wildcards = snakemake.wildcards
    wanted = plan.annotations[f"{wildcards.annotator}/{wildcards.mixture}/{wildcards.key}"]
    folder = Path(f"resources/{wildcards.smoke}teacher", wildcards.annotator, wildcards.mixture)
    return PrecomputeJob(
        checkpoint=Path(snakemake.input.checkpoint).parent,
        tokens=Path(snakemake.input.tokens).parent,
        spec=_unchanged(snakemake, plan.annotation_spec(wanted)),
        settings=wanted.settings,
        out=folder / wildcards.key,
        state=folder / "state" / wildcards.key,
    )


def _device(snakemake: Any) -> str:
    """Where a model runs that answers or annotates."""
    import torch

    return "cuda" if _gpus(snakemake) and torch.cuda.is_available() else "cpu"


@offline_job
def prepare_benchmark(snakemake: Any, plan: Plan) -> None:
    """Turn a benchmark's official files into questions, references and images."""
    from mmpipe.benchmarks.prepare import prepare

    name = snakemake.wildcards.benchmark
    smoke = bool(snakemake.wildcards.smoke)
    entry = plan.benchmark_entry(name, smoke)
    spec = _unchanged(snakemake, plan.benchmark_spec(name, smoke))
    source = Path("resources/datasets", entry.data)
    inputs = manifest.input_hashes([source / manifest.NAME])
    out = Path(snakemake.output.manifest).parent
    with staged_directory(out) as staged:
        facts = prepare(entry, source, staged)
        manifest.write(staged, kind="benchmark", spec=spec, inputs=inputs, **facts)


@offline_job
def answer(snakemake: Any, plan: Plan) -> None:
    """Answer one chunk of a benchmark's questions, going on from the answers an interrupted run left."""
    from mmpipe.analysis.expert_log import merge, pieces
    from mmpipe.artifacts.state import open_state
    from mmpipe.benchmarks.prepare import read_questions
    from mmpipe.inference.chunks import answer_chunk, split
    from mmpipe.models.moe.hooks import without_first
    from mmpipe.models.sparsity.hooks import set_keep_rate

    wildcards = snakemake.wildcards
    entry = plan.benchmarks[wildcards.benchmark]
    checkpoint = Path(snakemake.input.checkpoint).parent
    prepared = Path(snakemake.input.benchmark).parent
    index, _, chunks = wildcards.chunk.partition("-of-")
    parts = split(read_questions(prepared), int(chunks))
    questions = parts[int(index)]
    out = Path(snakemake.output[0])
    inputs = manifest.input_hashes([checkpoint / manifest.NAME, prepared / manifest.NAME])
    state = out.parent.parent / "state" / wildcards.chunk
    logs = plan.expert_logs.spec() if hasattr(snakemake.output, "experts") else ""
    with open_state(state, manifest.fingerprint(wildcards.chunk + logs, inputs)):
        answerer = _open_to_ask(snakemake)
        variant = variants.split(wildcards.checkpoint)[1]
        if variant:
            set_keep_rate(answerer.model, variant.keep_rate, wildcards.checkpoint)
        protocol = get(entry.task).protocol(entry.protocol)
        log.info("%d questions on %s in %s", len(questions), answerer.model.device, answerer.model.dtype)
        start = sum(map(len, parts[: int(index)]))
        experts = _expert_log(snakemake, plan, answerer.model, state / "experts", questions, start)
        leaving_out = entry.control == "without_first_expert"
        with without_first(answerer.model) if leaving_out else nullcontext():
            done = answer_chunk(
                questions,
                lambda left: _with_progress(
                    answerer.answer(
                        left,
                        batch_size=entry.batch_size,
                        max_new_tokens=entry.max_new_tokens or protocol.max_new_tokens,
                        num_beams=protocol.num_beams,
                        log=experts,
                    ),
                    len(left),
                    f"{wildcards.checkpoint} {wildcards.benchmark}",
                ),
                state,
                out,
                keep=experts.recover if experts else None,
            )
        log.info("%(asked)d answered, %(resumed)d kept from an interrupted run", done)
        if experts:
            rows = merge(pieces(experts.folder), Path(snakemake.output.experts))
            log.info("%d choices of experts logged", rows)
    shutil.rmtree(state)


def _open_to_ask(snakemake: Any) -> Any:
    """The checkpoint of a job, ready to answer."""
    import torch

    from mmpipe.inference.open_answerer import open_answerer

    torch.set_num_threads(snakemake.threads)
    _quiet_transformers()
    checkpoint = Path(snakemake.input.checkpoint).parent
    return open_answerer(checkpoint, _device(snakemake), model_id=snakemake.wildcards.checkpoint)


def _expert_log(snakemake: Any, plan: Plan, model: Any, folder: Path, questions: list[Any], start: int) -> Any:
    """The log of experts where the rule declares one."""
    from mmpipe.analysis.expert_log import ExpertLog

    settings = plan.expert_logs.settings
    if not hasattr(snakemake.output, "experts") or settings is None:
        return None
    if not str(snakemake.output.experts).endswith(plan.expert_logs.chunk_ending):
        raise ConfigError("log_experts changed after this job was planned; run the same command again")
    return ExpertLog(model, folder, questions, start, settings.layers)


def _with_progress(things: Iterator[Any], total: int, title: str) -> Iterator[Any]:
    from tqdm import tqdm

    return iter(tqdm(things, total=total, desc=title, disable=not sys.stderr.isatty()))


@offline_job
def gather(snakemake: Any, plan: Plan) -> None:
    """Join the chunks of answers after proving them complete."""
    from mmpipe.benchmarks.prepare import read_questions
    from mmpipe.inference.chunks import gather

    questions = read_questions(Path(snakemake.input.questions).parent)
    count = gather(questions, [Path(path) for path in snakemake.input.chunks], Path(snakemake.output[0]))
    log.info("%d answers", count)


@offline_job
def gather_experts(snakemake: Any, plan: Plan) -> None:
    """Join the chunks of a log of experts."""
    from mmpipe.analysis.expert_log import merge

    _unchanged(snakemake, plan.expert_logs.spec())
    rows = merge([Path(path) for path in snakemake.input], Path(snakemake.output[0]))
    log.info("%d choices of experts", rows)


@offline_job
def analyse(snakemake: Any, plan: Plan) -> None:
    """Compute one family of metrics of experts, and draw it."""
    from mmpipe.analysis.base import MetricInput, draw

    family = plan.expert_logs.families[snakemake.wildcards.family]
    sources = [MetricInput.of(path) for path in snakemake.input]
    if family.runs_model:
        settings = plan.expert_logs.settings
        assert settings is not None
        _quiet_transformers()
        rows = family.measure(sources, _device(snakemake), settings.similarity_questions)
    else:
        rows = family.table(sources)
    write_csv(Path(snakemake.output.table), rows)
    draw(family, rows, Path(snakemake.output.figure))


@offline_job
def measure_efficiency(snakemake: Any, plan: Plan) -> None:
    """Measure what a sparsified checkpoint saves at every keep rate."""
    from mmpipe.analysis.efficiency import facts, measure
    from mmpipe.benchmarks.prepare import read_questions

    _unchanged(snakemake, plan.efficiency.spec())
    prepared = Path(snakemake.input.benchmark).parent
    questions = read_questions(prepared)
    answerer = _open_to_ask(snakemake)
    rows = measure(answerer, questions, plan.config.keep_rates)
    where = {"checkpoint": snakemake.wildcards.checkpoint, "benchmark": prepared.name}
    libraries = {"libraries": manifest.library_versions()}
    write_json(Path(snakemake.output.json), where | facts(answerer, questions) | libraries | {"rows": rows})
    write_csv(Path(snakemake.output.csv), rows)


@offline_job
def show_efficiency(snakemake: Any, plan: Plan) -> None:
    """Lay out and draw what a sparsified checkpoint saves."""
    from mmpipe.report.sparsity import draw_efficiency, efficiency_page

    efficiency_page(Path(snakemake.input[0]), Path(snakemake.output.table))
    draw_efficiency(Path(snakemake.input[0]), Path(snakemake.output.figure))


@offline_job
def map_kept(snakemake: Any, plan: Plan) -> None:
    """Show which tokens of some images a sparsified checkpoint keeps."""
    from mmpipe.analysis.retention_maps import grid, retention_maps, seen
    from mmpipe.benchmarks.prepare import evenly, read_questions
    from mmpipe.report.samples import SHOWN
    from mmpipe.report.sparsity import keep_maps_page

    _unchanged(snakemake, plan.efficiency.spec())
    prepared = Path(snakemake.input.benchmark).parent
    # some of those whose answers the samples show
    questions = [question for question in evenly(read_questions(prepared), SHOWN) if question.images][::2]
    answerer = _open_to_ask(snakemake)
    maps = retention_maps(answerer, questions, plan.config.keep_rates)
    images = [image for question in questions for image in seen(answerer, question)]
    write_json(Path(snakemake.output.json), maps)
    title = f"What {snakemake.wildcards.checkpoint} keeps of images of {prepared.name}"
    places = grid(answerer.model.config.image_seq_length)
    keep_maps_page(title, maps, images, places, Path(snakemake.output.page))


@job
def judge(snakemake: Any, plan: Plan) -> None:
    """Ask the judge about the answers, going on from the replies an interrupted run left."""
    from mmpipe.benchmarks.judge import judge_answers

    entry = plan.benchmarks[snakemake.wildcards.benchmark]
    if entry.judge is None:
        raise ConfigError(f"{snakemake.wildcards.benchmark}: no judge is configured; give the entry a 'judge'")
    _unchanged(snakemake, plan.judge_spec(snakemake.wildcards.benchmark))
    out = Path(snakemake.output[0])
    progress = out.parent / "state" / "judge.jsonl"
    counts = judge_answers(
        entry.task, [Path(snakemake.input.references)], [Path(snakemake.input.answers)], progress, entry.judge
    )
    log.info("%s", counts)
    with atomic_open(out) as file:
        file.write(progress.read_bytes())


@offline_job
def score(snakemake: Any, plan: Plan) -> None:
    """Score the answers of one checkpoint."""
    from mmpipe.benchmarks.scoring import score_files

    entry = plan.benchmarks[snakemake.wildcards.benchmark]
    checkpoint = Path(snakemake.input.checkpoint)
    result = score_files(
        entry.task,
        [Path(snakemake.input.references)],
        [Path(snakemake.input.answers)],
        protocol=entry.protocol,
        judge=next((Path(path) for path in snakemake.input.judge), None) if entry.judge else None,
        per_item=Path(snakemake.output.per_item),
        out=Path(snakemake.output.score),
        lineage={"checkpoint": {"path": checkpoint.as_posix(), "sha256": sha256(checkpoint)}},
    )
    log.info("%s", result["metrics"])


@offline_job
def convert(snakemake: Any, plan: Plan) -> None:
    """Write the submission of one checkpoint to one benchmark."""
    from mmpipe.benchmarks.scoring import convert_files

    entry = plan.benchmarks[snakemake.wildcards.benchmark]
    report = convert_files(
        entry.task, [Path(snakemake.input.references)], [Path(snakemake.input.answers)], Path(snakemake.output[0])
    )
    log.info("%s", report)


@offline_job
def compare(snakemake: Any, plan: Plan) -> None:
    """Set the scores of all chosen checkpoints side by side."""
    from mmpipe.benchmarks.compare import compare
    from mmpipe.benchmarks.published import beside

    name = snakemake.wildcards.benchmark
    out = Path(snakemake.output.json).parent

    def scores(benchmark: str, mark: str = "") -> dict[str, Any]:
        return {
            f"{checkpoint}{mark}": read_json(out / checkpoint / "eval" / benchmark / "score.json")
            for checkpoint in plan.chosen_recipes
        }

    controls = {
        key: value
        for control in plan.controls(name)
        for key, value in scores(control, f" ({plan.benchmarks[control].control})").items()
    }
    marks = ["", *(f" ({plan.benchmarks[control].control})" for control in plan.controls(name))]
    family = {f"{c}{mark}": f"{plan.family(c)}{mark}" for c in plan.chosen_recipes for mark in marks}
    comparison = {"title": plan.benchmarks[name].title or name, **compare(name, scores(name), controls, family=family)}
    published = json.loads(_unchanged(snakemake, plan.published(name), "published"))
    write_json(Path(snakemake.output.json), {**comparison, "published": beside(comparison, published)})


@offline_job
def rank(snakemake: Any, plan: Plan) -> None:
    """Set all chosen checkpoints side by side on all benchmarks."""
    from mmpipe.artifacts.files import read_jsonl
    from mmpipe.benchmarks.leaderboard import as_table, leaderboard

    out = Path(snakemake.output.json).parent

    def of_each(read: Callable[[Path], Any], file: str) -> dict[str, dict[str, Any]]:
        return {
            benchmark: {
                checkpoint: read(out / checkpoint / "eval" / benchmark / file) for checkpoint in plan.chosen_recipes
            }
            for benchmark in plan.compared_benchmarks
        }

    family = {checkpoint: plan.family(checkpoint) for checkpoint in plan.chosen_recipes}
    board = leaderboard(of_each(read_json, "score.json"), of_each(read_jsonl, "per_item.jsonl"), family)
    write_json(Path(snakemake.output.json), board)
    write_csv(Path(snakemake.output.csv), as_table(board))


@offline_job
def show_leaderboard(snakemake: Any, plan: Plan) -> None:
    """Lay out the ranking as a table."""
    from mmpipe.report.tables import leaderboard_page

    leaderboard_page(Path(snakemake.input[0]), Path(snakemake.output[0]))


@offline_job
def show_training(snakemake: Any, plan: Plan) -> None:
    """Draw a stage's loss curves for the report."""
    from mmpipe.report.stage import draw_history

    draw_history(Path(snakemake.input[0]), Path(snakemake.output[0]))


@offline_job
def show_checkpoint(snakemake: Any, plan: Plan) -> None:
    """Lay out what a checkpoint was made from for the report."""
    from mmpipe.report.stage import settings_page

    settings_page(Path(snakemake.input[0]), Path(snakemake.output[0]))


@offline_job
def show_mixture(snakemake: Any, plan: Plan) -> None:
    """Lay out a mixture's verification report as a table."""
    from mmpipe.report.tables import mixture_page

    mixture_page(Path(snakemake.input.report), Path(snakemake.output[0]))


@offline_job
def show_overlap(snakemake: Any, plan: Plan) -> None:
    """Lay out the overlap of a mixture with the benchmarks as a table."""
    from mmpipe.report.tables import overlap_page

    overlap_page(Path(snakemake.input.report), Path(snakemake.output[0]))


@offline_job
def show_tokens(snakemake: Any, plan: Plan) -> None:
    """Lay out what became of a mixture in tokens as a table."""
    from mmpipe.report.tables import tokens_page

    tokens_page(Path(snakemake.input.report), Path(snakemake.output[0]))


@offline_job
def show_samples(snakemake: Any, plan: Plan) -> None:
    """Show some questions with their images, the answers and the verdicts."""
    from mmpipe.report.samples import samples_page

    samples_page(
        Path(snakemake.input.questions).parent,
        Path(snakemake.input.answers),
        Path(snakemake.input.per_item),
        Path(snakemake.output[0]),
    )


@offline_job
def show_comparison(snakemake: Any, plan: Plan) -> None:
    """Lay out a comparison as a table."""
    from mmpipe.report.tables import comparison_page

    comparison_page(Path(snakemake.input[0]), Path(snakemake.output[0]))
