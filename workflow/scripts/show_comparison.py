from mmpipe.jobs import show_comparison

show_comparison(snakemake)  # noqa: F821 - provided by Snakemake
