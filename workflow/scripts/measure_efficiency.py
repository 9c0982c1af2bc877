"""Measure the cost of a sparsified checkpoint at every keep rate, or map the image tokens that it retains."""

from pathlib import Path
from typing import Any

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import write_csv, write_json
from mmpipe.jobs import device, mock_snakemake, offline_job, unchanged
from mmpipe.plan.plan import Plan


@offline_job
def main(snakemake: Any, plan: Plan) -> None:
    from mmpipe.inference.open_answerer import open_answerer

    unchanged(snakemake, plan.efficiency.spec())
    prepared, checkpoint = (Path(path).parent for path in (snakemake.input.benchmark, snakemake.input.checkpoint))
    answerer = open_answerer(checkpoint, device(snakemake), model_id=snakemake.wildcards.checkpoint)
    step = map_retained if hasattr(snakemake.output, "page") else measure_cost
    step(snakemake, plan, answerer, prepared)


def measure_cost(snakemake: Any, plan: Plan, answerer: Any, prepared: Path) -> None:
    from mmpipe.analysis.efficiency import facts, measure
    from mmpipe.benchmarks.prepare import read_questions

    questions = read_questions(prepared)
    rows = measure(answerer, questions, plan.config.keep_rates)
    where = {"checkpoint": snakemake.wildcards.checkpoint, "benchmark": prepared.name}
    libraries = {"libraries": manifest.library_versions()}
    write_json(Path(snakemake.output.json), where | facts(answerer, questions) | libraries | {"rows": rows})
    write_csv(Path(snakemake.output.csv), rows)


def map_retained(snakemake: Any, plan: Plan, answerer: Any, prepared: Path) -> None:
    from mmpipe.analysis.retention_maps import grid, retention_maps, seen
    from mmpipe.benchmarks.prepare import evenly, read_questions
    from mmpipe.report.pages import SAMPLES, retention_maps_page

    # some of those whose answers the samples show
    questions = [question for question in evenly(read_questions(prepared), SAMPLES) if question.images][::2]
    maps = retention_maps(answerer, questions, plan.config.keep_rates)
    images = [image for question in questions for image in seen(answerer, question)]
    write_json(Path(snakemake.output.json), maps)
    title = f"Image tokens of {prepared.name} that {snakemake.wildcards.checkpoint} retains"
    places = grid(answerer.model.config.image_seq_length)
    retention_maps_page(title, maps, images, places, Path(snakemake.output.page))


if __name__ == "__main__":
    configfiles = ["config/demo-dynamic.yaml"]
    main(
        globals().get("snakemake")
        or mock_snakemake("measure_efficiency", configfiles=configfiles, checkpoint="demo-dynamic")
    )
