"""Count the images that a mixture shares with the benchmarks."""

from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import write_json
from mmpipe.jobs import log, mock_snakemake, offline_job
from mmpipe.plan.plan import Plan


@offline_job
def main(snakemake: Any, plan: Plan) -> None:
    from mmpipe.benchmarks.contamination import contamination

    benchmarks = {Path(path).parent.name: Path(path).parent for path in snakemake.input.benchmarks}
    found = contamination(Path(snakemake.input.mixture).parent, benchmarks)
    for name, facts in found["benchmarks"].items():
        if facts["shared_images"]:
            log.warning("%s: %d images are also trained on", name, facts["shared_images"])
    write_json(Path(snakemake.output.report), found)


if __name__ == "__main__":
    main(globals().get("snakemake") or mock_snakemake("check_contamination", mixture="shapes-finetune"))
