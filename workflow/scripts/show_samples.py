from mmpipe.jobs import show_samples

show_samples(snakemake)  # noqa: F821 - provided by Snakemake
