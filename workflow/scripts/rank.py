from mmpipe.jobs import rank

rank(snakemake)  # noqa: F821 - provided by Snakemake
