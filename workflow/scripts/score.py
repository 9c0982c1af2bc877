from mmpipe.jobs import score

score(snakemake)  # noqa: F821 - provided by Snakemake
