from mmpipe.jobs import show_training

show_training(snakemake)  # noqa: F821 - provided by Snakemake
