from mmpipe.jobs import tokenise

tokenise(snakemake)  # noqa: F821 - provided by Snakemake
