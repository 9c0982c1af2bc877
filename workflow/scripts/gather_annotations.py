from mmpipe.jobs import gather_annotations

gather_annotations(snakemake)  # noqa: F821 - provided by Snakemake
