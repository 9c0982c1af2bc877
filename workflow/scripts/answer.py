from mmpipe.jobs import answer

answer(snakemake)  # noqa: F821 - provided by Snakemake
