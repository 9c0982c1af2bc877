from mmpipe.jobs import compare

compare(snakemake)  # noqa: F821 - provided by Snakemake
