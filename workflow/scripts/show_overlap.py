from mmpipe.jobs import show_overlap

show_overlap(snakemake)  # noqa: F821 - provided by Snakemake
