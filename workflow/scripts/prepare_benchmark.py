"""Convert a benchmark's official files into questions, references and images."""

from pathlib import Path
from typing import Any

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import staged_directory
from mmpipe.jobs import mock_snakemake, offline_job, unchanged
from mmpipe.plan.plan import Plan


@offline_job
def main(snakemake: Any, plan: Plan) -> None:
    from mmpipe.benchmarks.prepare import prepare

    name, smoke = snakemake.wildcards.benchmark, bool(snakemake.wildcards.smoke)
    entry = plan.benchmark_entry(name, smoke)
    spec = unchanged(snakemake, plan.benchmark_spec(name, smoke))
    source = Path("resources/datasets", entry.data)
    inputs = manifest.input_hashes([source / manifest.NAME])
    with staged_directory(Path(snakemake.output.manifest).parent) as staged:
        facts = prepare(entry, source, staged)
        manifest.write(staged, kind="benchmark", spec=spec, inputs=inputs, **facts)


if __name__ == "__main__":
    main(globals().get("snakemake") or mock_snakemake("prepare_benchmark", benchmark="mmbench"))
