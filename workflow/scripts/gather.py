from mmpipe.workflow import gather

gather(snakemake)  # noqa: F821 - provided by Snakemake
