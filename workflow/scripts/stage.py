from mmpipe.jobs import stage

stage(snakemake)  # noqa: F821 - provided by Snakemake
