from mmpipe.jobs import map_kept

map_kept(snakemake)  # noqa: F821 - provided by Snakemake
