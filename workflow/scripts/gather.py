from mmpipe.jobs import gather

gather(snakemake)  # noqa: F821 - provided by Snakemake
