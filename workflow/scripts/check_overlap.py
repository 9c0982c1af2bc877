from mmpipe.jobs import check_overlap

check_overlap(snakemake)  # noqa: F821 - provided by Snakemake
