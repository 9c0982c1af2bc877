from mmpipe.jobs import fetch

fetch(snakemake)  # noqa: F821 - provided by Snakemake
