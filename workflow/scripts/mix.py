"""Verify the records of a mixture and write them in one file."""

from pathlib import Path
from typing import Any

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import staged_directory
from mmpipe.jobs import failed_report, log, mock_snakemake, offline_job, unchanged
from mmpipe.plan.plan import Plan


@offline_job
def main(snakemake: Any, plan: Plan) -> None:
    from mmpipe.data.mixture import build_mixture

    mixture = plan.mixtures[snakemake.wildcards.mixture]
    spec = unchanged(snakemake, plan.mixture_spec(snakemake.wildcards.mixture))
    datasets = {part.dataset: Path("resources/datasets", part.dataset) for part in mixture.parts}
    inputs = manifest.input_hashes([path / manifest.NAME for path in datasets.values()])
    out = Path(snakemake.output.manifest).parent
    with staged_directory(out) as staged:
        report = build_mixture(
            mixture,
            datasets,
            staged,
            workers=snakemake.threads,
            log=log.info,
            published=out,
            failed_report=failed_report(snakemake),
        )
        manifest.write(staged, kind="mixture", spec=spec, inputs=inputs, records=report["kept"])


if __name__ == "__main__":
    main(globals().get("snakemake") or mock_snakemake("mix_data", mixture="shapes-finetune"))
