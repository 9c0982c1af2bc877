from mmpipe.workflow import score

score(snakemake)  # noqa: F821 - provided by Snakemake
