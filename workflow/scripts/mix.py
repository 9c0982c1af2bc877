from mmpipe.jobs import mix

mix(snakemake)  # noqa: F821 - provided by Snakemake
