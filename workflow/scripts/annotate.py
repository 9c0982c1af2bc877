from mmpipe.jobs import annotate

annotate(snakemake)  # noqa: F821 - provided by Snakemake
