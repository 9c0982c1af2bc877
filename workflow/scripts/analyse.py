from mmpipe.jobs import analyse

analyse(snakemake)  # noqa: F821 - provided by Snakemake
