from mmpipe.workflow import convert

convert(snakemake)  # noqa: F821 - provided by Snakemake
