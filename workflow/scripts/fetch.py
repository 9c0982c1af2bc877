"""Fetch a backbone or a data set."""

from pathlib import Path
from typing import Any

from mmpipe.artifacts import manifest
from mmpipe.jobs import job, mock_snakemake, unchanged
from mmpipe.plan.plan import Plan


@job
def main(snakemake: Any, plan: Plan) -> None:
    from mmpipe.sources.transfer.lock import locked

    catalogue, name = next(iter(snakemake.wildcards.items()))
    source = getattr(plan, f"{catalogue}s")[name]
    spec = unchanged(snakemake, plan.source_spec(source))
    out = Path(snakemake.output.manifest).parent
    needed = [Path("resources/datasets", need, manifest.NAME) for need in source.needs()]
    facts = source.fetch(out, locked(f"{catalogue}s", name))
    manifest.write(out, kind="source", spec=spec, inputs=manifest.input_hashes(needed), **facts)


if __name__ == "__main__":
    main(globals().get("snakemake") or mock_snakemake("fetch_dataset", dataset="shapes-captions"))
