from mmpipe.jobs import show_checkpoint

show_checkpoint(snakemake)  # noqa: F821 - provided by Snakemake
