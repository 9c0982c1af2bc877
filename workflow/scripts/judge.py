from mmpipe.jobs import judge

judge(snakemake)  # noqa: F821 - provided by Snakemake
