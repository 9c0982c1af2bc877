from mmpipe.workflow import analyse

analyse(snakemake)  # noqa: F821 - provided by Snakemake
