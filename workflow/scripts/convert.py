from mmpipe.jobs import convert

convert(snakemake)  # noqa: F821 - provided by Snakemake
