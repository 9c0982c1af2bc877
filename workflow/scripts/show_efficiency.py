from mmpipe.jobs import show_efficiency

show_efficiency(snakemake)  # noqa: F821 - provided by Snakemake
