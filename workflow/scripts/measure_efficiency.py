from mmpipe.jobs import measure_efficiency

measure_efficiency(snakemake)  # noqa: F821 - provided by Snakemake
