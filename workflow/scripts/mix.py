from mmpipe.workflow import mix

mix(snakemake)  # noqa: F821 - provided by Snakemake
