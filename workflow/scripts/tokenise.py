from mmpipe.workflow import tokenise

tokenise(snakemake)  # noqa: F821 - provided by Snakemake
