from mmpipe.workflow import answer

answer(snakemake)  # noqa: F821 - provided by Snakemake
